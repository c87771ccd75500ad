"""The frozen maps of a run: asked for, computed once, rounded as they travel, named by digest."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.alignment.align import (
    align_types,
    join_known,
    read_digest,
)
from heterotune_flwr.alignment.factor_checks import fault_of
from heterotune_flwr.alignment.views import classifier_places, view_asked
from heterotune_flwr.data.symbols import NO_SYMBOLS, RunSymbols
from heterotune_flwr.errors import ConfigError, HeteroTuneError
from heterotune_flwr.exchange.directions import exact_codec
from heterotune_flwr.exchange.packing import (
    Tensors,
    round_trip,
    tensor_digest,
)
from heterotune_flwr.federation.factors_asked import Asked, Question, ask_types
from heterotune_flwr.federation.journal import Journal, Pace, writing
from heterotune_flwr.federation.kept_maps import KeptMaps
from heterotune_flwr.federation.roster import Roster
from heterotune_flwr.federation.symbols_service import SymbolsService, query_seconds
from heterotune_flwr.flower import Grid, is_simulation
from heterotune_flwr.names import safe_text
from heterotune_flwr.protocol.messages import Header
from heterotune_flwr.protocol.queries import AlignRequest
from heterotune_flwr.schema import Config, MethodConfig, TrainConfig


@dataclass(frozen=True)
class Maps:
    """Frozen maps per type, exactly as the clients will hold them.

    Attributes
    ----------
    tensors, digests
        Type -> maps and their identity.
    quality
        Type -> held-out canonical correlation per slot.
    bytes_down, bytes_up
        What asking for the factors cost, per client id (nothing when they were known).
    spreads
        Standard deviation over the anchors of every latent of the last slot, then of whole texts where they are
        aligned; None where an older program made the maps.
    lost, away
        Type -> why it has no maps, and whether the reason of one was that its clients were away.

    """

    tensors: dict[str, Tensors]
    digests: dict[str, str]
    quality: dict[str, list[float]]
    bytes_down: dict[str, int]
    bytes_up: dict[str, int]
    spreads: NDArray[np.float64] | None = None
    lost: dict[str, str] = field(default_factory=dict)
    away: bool = False


def _fingerprints(roster: Roster) -> dict[str, str]:
    return {key: roster.info_of(key).fingerprint for key in roster.type_keys}


@dataclass
class _Inquiry(Asked):
    """One computation of maps: for whom, and what asking clients for it has come to."""

    roster: Roster
    method: MethodConfig
    train: TrainConfig
    seed: int
    symbols: RunSymbols
    away: bool = False


class MapsService:
    """Computes the maps of a run's types, once for all its strategies."""

    def __init__(
        self,
        grid: Grid,
        config: Config,
        journal: Journal,
        run_name: str,
        symbols: SymbolsService,
    ) -> None:
        self._grid = grid
        self._symbols = symbols
        self._config = config
        self._journal = journal
        self._run_name = run_name
        self._factors: dict[tuple[str, str, int], Tensors] = {}
        self._done: dict[str, Maps] = {}
        self._unsaved: dict[Path, KeptMaps] = {}

    def weights(self) -> dict[str, str]:
        """Type -> fingerprint of the weights this run was trained with so far; their maps are never made anew."""
        found: dict[str, str] = {}
        for path in sorted((self._journal.directory / "maps").glob("*.safetensors")):
            kept = KeptMaps.load(path)
            found |= kept.fingerprints if kept is not None else {}
        return found

    def get(
        self,
        roster: Roster,
        method: MethodConfig,
        train: TrainConfig,
        seed: int,
        symbols: RunSymbols = NO_SYMBOLS,
    ) -> Maps:
        """Maps for all types of a roster; ``method.output`` is resolved, ``seed`` for controls.

        They do not depend on ``train``, by which clients judge whether they take part at all.
        """
        if self._config.alignment.control == "none":
            seed = 0  # only the controls draw random numbers: one alignment serves all seeds
        key = json.dumps([dataclasses.asdict(method), roster.type_keys, seed], sort_keys=True)
        if key not in self._done:
            first = symbols.first(self._config.alignment.symbols)
            self._done[key] = self._compute(_Inquiry(roster, method, train, seed, first))
        return self._done[key]

    def keep(self) -> None:
        """Save what is new in the run directory: once it is certain that the run goes on with it."""
        for path, kept in self._unsaved.items():
            with writing(path.parent):
                kept.save(path)
        self._unsaved = {}

    def _compute(self, inquiry: _Inquiry) -> Maps:
        roster, method, seed = inquiry.roster, inquiry.method, inquiry.seed
        path = KeptMaps.path(self._journal.directory, method, seed)
        kept = self._unsaved.get(path) or KeptMaps.load(path)
        joined: list[str] = []
        shrinkage: list[float] = []
        if kept is None:
            kept = self._align(inquiry)
            self._unsaved[path], shrinkage = kept, kept.shrinkage
        else:
            joined = [key for key in roster.type_keys if key not in kept.tensors]
            for type_key in joined:
                kept = self._join(kept, type_key, inquiry)
                if type_key in kept.tensors:
                    self._unsaved[path] = kept
        present = [key for key in roster.type_keys if key in kept.tensors]
        tensors, quality = kept.of(present)
        self._journal.event(
            "align",
            seed=seed,
            quality=quality,
            shrinkage=shrinkage,
            cached=not inquiry.up,
            bytes_up=sum(inquiry.up.values()),
            joined=[key for key in joined if key in present],
        )
        digests = {key: tensor_digest(value) for key, value in tensors.items()}
        places = [f"{place}.weights" for place in classifier_places(method)]
        spreads = None
        if set(places) <= set(kept.latents):
            spreads = np.concatenate([np.asarray(kept.latents[p], np.float64) for p in places])
        lost = {key: inquiry.trust.lost[key] for key in roster.type_keys if key not in present}
        return Maps(
            tensors, digests, quality, inquiry.down, inquiry.up, spreads, lost, inquiry.away
        )

    def _align(self, inquiry: _Inquiry) -> KeptMaps:
        """Align all types of a roster with each other."""
        roster, method = inquiry.roster, inquiry.method
        fingerprints = _fingerprints(roster)

        def ask(part: str, type_keys: list[str]) -> dict[str, Tensors]:
            what = (part, method.slots)
            missing = [key for key in type_keys if (key, *what) not in self._factors]
            fresh = self._ask(inquiry, missing, inquiry.symbols, part)
            doubted = inquiry.trust.unchecked | inquiry.trust.apart
            sure = {key: value for key, value in fresh.items() if key not in doubted}
            self._factors |= {(key, *what): value for key, value in sure.items()}
            known = {key: self._factors[key, *what] for key in type_keys if key not in missing}
            return known | fresh

        result = align_types(
            fingerprints, self._config, method, roster.labels, ask, inquiry.seed, inquiry.trust
        )
        codec = exact_codec(self._config.exchange)
        tensors = {key: round_trip(maps, codec) for key, maps in result.maps.items()}
        return KeptMaps(
            tensors, result.quality, fingerprints, result.shrinkage, result.anchor_latents
        )

    def _join(self, kept: KeptMaps, type_key: str, inquiry: _Inquiry) -> KeptMaps:
        """Fit a type that this run does not know yet to the known latents; the others' maps stay as they are."""
        roster = inquiry.roster
        fingerprint = _fingerprints(roster)[type_key]
        try:
            if not kept.latents:
                raise ConfigError(
                    "the run was begun by an older program, which did not keep what a new type is fitted to"
                )
            known, symbols = kept.known(), inquiry.symbols
            if symbols.packed:
                header = self._header(inquiry)
                mask = self._symbols.known(type_key, symbols, roster, header)
                known, symbols = kept.known(mask), symbols.only(mask)
            maps, quality = join_known(
                known, type_key, fingerprint, self._config, inquiry.method, roster.labels,
                lambda part, keys: self._ask(inquiry, keys, symbols, part), inquiry.trust,
            )  # fmt: skip
        except HeteroTuneError as error:
            inquiry.trust.lost[type_key] = (
                f"{type_key} is new in this run, and cannot join it: {error}; start a new run with it"
            )
            return kept
        maps = round_trip(maps, exact_codec(self._config.exchange))
        return kept.with_type(type_key, maps, quality, fingerprint)

    def _header(self, inquiry: _Inquiry) -> Header:
        name = f"{self._run_name}-align"
        return Header(name, inquiry.seed, inquiry.method, train=inquiry.train)

    def _ask(
        self, inquiry: _Inquiry, type_keys: list[str], symbols: RunSymbols, part: str
    ) -> dict[str, Tensors]:
        """Get one part of the factors of some types (:mod:`.factors_asked`); what is wrong goes on record."""
        if not type_keys:
            return {}
        roster, slots = inquiry.roster, inquiry.method.slots
        self._journal.event(
            "aligning",
            seed=inquiry.seed,
            part=part,
            types=type_keys,
            anchors=self._config.alignment.count,
            cached=self._config.alignment.cache,
        )
        anchors = read_digest(self._config.alignment, part)
        request = AlignRequest(self._header(inquiry), slots, symbols.packed, part, anchors)
        by_labels = self._config.alignment.output == "labels"
        outputs = (len(roster.labels or ()), 0) if by_labels else (0, symbols.count)

        def fault(client_id: str, factors: Tensors) -> str:
            hidden = roster.clients[client_id].info.hidden
            view, (labels, rows) = view_asked(part), outputs
            return fault_of(factors, slots, view, hidden, labels, slots > 1, rows)

        server = self._config.server
        question = Question(
            request.to_content(), fault, inquiry.pay, query_seconds(server), server.wait_seconds,
            1 if is_simulation(self._grid) else 2, Pace(self._journal, "aligning"),
        )  # fmt: skip
        factors, answers = ask_types(self._grid, roster, type_keys, question, inquiry.trust)
        for key, one in answers.items():
            for reason in one.reasons:
                self._journal.event("factors_refused", type=key, reason=safe_text(reason))
            if key in inquiry.trust.unchecked and one.told:
                reason = f"aligned by one client, {one.told[0][0]}: unchecked"
                self._journal.event("unchecked", type=key, reason=safe_text(reason))
            if key in inquiry.trust.apart:
                told = ", ".join(client_id for client_id, _ in one.told)
                reason = f"{told} disagree about its factors: it shares nothing with other types"
                self._journal.event("apart", type=key, reason=safe_text(reason))
            if key in inquiry.trust.lost and one.passing:
                inquiry.away = True
        return factors
