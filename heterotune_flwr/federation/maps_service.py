"""The frozen maps of a run: asked for, computed once, rounded as they travel, named by digest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.config.schema import Config, MethodConfig, ServerConfig
from heterotune_flwr.dema.alignment import align_types, load_anchors, public_words
from heterotune_flwr.errors import FederationError, HeteroTuneError
from heterotune_flwr.exchange.directions import exact_codec
from heterotune_flwr.exchange.packing import (
    Tensors,
    content_bytes,
    round_trip,
    tensor_digest,
)
from heterotune_flwr.exchange.trees import load_state, save_state
from heterotune_flwr.federation.journal import Journal, writing
from heterotune_flwr.federation.messenger import converse, make_message
from heterotune_flwr.federation.protocol import ALIGN, Header, pack_mask, unpack_mask
from heterotune_flwr.federation.queries import AlignReply, AlignRequest
from heterotune_flwr.federation.roster import AGAIN_SECONDS, Roster
from heterotune_flwr.flower import Grid


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

    """

    tensors: dict[str, Tensors]
    digests: dict[str, str]
    quality: dict[str, list[float]]
    bytes_down: dict[str, int]
    bytes_up: dict[str, int]


def query_seconds(server: ServerConfig) -> float:
    """How long an answer before the first round is waited for."""
    return server.timeout_seconds if server.query_seconds is None else server.query_seconds


class MapsService:
    """Computes the maps of a run's types, once for all its strategies."""

    def __init__(self, grid: Grid, config: Config, journal: Journal, run_name: str) -> None:
        self._grid = grid
        self._config = config
        self._journal = journal
        self._run_name = run_name
        self._factors: dict[tuple[str, int], Tensors] = {}
        self._done: dict[str, Maps] = {}
        self._words: list[str] | None = None

    def words(self) -> list[str]:
        """Public word list every client marks its single-token words in; empty when not needed."""
        alignment = self._config.alignment
        if self._words is None:
            by_words = alignment.output == "vocabulary"
            self._words = public_words(load_anchors(alignment), alignment.words) if by_words else []
        return self._words

    def get(self, roster: Roster, method: MethodConfig, seed: int) -> Maps:
        """Maps for all types of a roster; ``method.output`` is resolved, ``seed`` for controls."""
        if self._config.alignment.control == "none":
            seed = 0  # only the controls draw random numbers: one alignment serves all seeds
        key = json.dumps([dataclasses.asdict(method), roster.type_keys, seed], sort_keys=True)
        if key not in self._done:
            self._done[key] = self._compute(roster, method, seed)
        return self._done[key]

    def _compute(self, roster: Roster, method: MethodConfig, seed: int) -> Maps:
        down: dict[str, int] = {}
        up: dict[str, int] = {}
        infos = {key: roster.clients[roster.of_type(key)[0]].info for key in roster.type_keys}
        fingerprints = {key: info.fingerprint for key, info in infos.items()}

        kept = self._kept_path(method, seed)
        if (known := self._kept(kept, fingerprints)) is not None:
            self._journal.event(
                "align", seed=seed, quality=known.quality, shrinkage={}, cached=True, bytes_up=0
            )
            return known

        def ask(type_keys: list[str]) -> dict[str, Tensors]:
            missing = [key for key in type_keys if (key, method.slots) not in self._factors]
            fresh = self._ask(roster, missing, method, seed, down, up)
            self._factors |= {(key, method.slots): value for key, value in fresh.items()}
            return {key: self._factors[key, method.slots] for key in type_keys}

        result = align_types(fingerprints, self._config, method, roster.labels, ask, seed)
        codec = exact_codec(self._config.exchange)
        tensors = {key: round_trip(result.maps[key], codec) for key in roster.type_keys}
        digests = {key: tensor_digest(value) for key, value in tensors.items()}
        self._journal.event(
            "align",
            seed=seed,
            quality=result.quality,
            shrinkage=result.shrinkage,
            cached=not up,
            bytes_up=sum(up.values()),
        )
        state = {"tensors": tensors, "quality": result.quality, "fingerprints": fingerprints}
        with writing(kept.parent):
            save_state(kept, state)
        return Maps(tensors, digests, result.quality, down, up)

    def _kept_path(self, method: MethodConfig, seed: int) -> Path:
        """Where the run directory keeps the maps: a resumed run must go on in the same latent space."""
        text = json.dumps([dataclasses.asdict(method), seed], sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self._journal.directory / "maps" / f"{name}.safetensors"

    def _kept(self, path: Path, fingerprints: dict[str, str]) -> Maps | None:
        """Maps that this run has computed before, None unless they are of these very backbones."""
        if not path.exists():
            return None
        state = load_state(path)
        if any(state["fingerprints"].get(key) != value for key, value in fingerprints.items()):
            return None
        tensors = {key: state["tensors"][key] for key in fingerprints}
        quality = {key: state["quality"][key] for key in fingerprints}
        digests = {key: tensor_digest(value) for key, value in tensors.items()}
        return Maps(tensors, digests, quality, {}, {})

    def _ask(
        self,
        roster: Roster,
        type_keys: list[str],
        method: MethodConfig,
        seed: int,
        down: dict[str, int],
        up: dict[str, int],
    ) -> dict[str, Tensors]:
        """Get the factors of some types, each from its first client that can give them.

        Where all of a type failed, those whose process died or whose node was away are asked again while
        ``server.wait_seconds`` last: they may be restarting.
        """
        words = self.words()
        masks = [
            unpack_mask(client.info.words_mask, len(words)) for client in roster.clients.values()
        ]
        shared: NDArray[np.bool_] = np.logical_and.reduce(masks)
        header = Header(f"{self._run_name}-align", seed, method)
        content = AlignRequest(header, method.slots, words, pack_mask(shared)).to_content()
        server = self._config.server
        timeout, deadline = query_seconds(server), time.monotonic() + server.wait_seconds
        factors: dict[str, Tensors] = {}
        waiting = {key: roster.of_type(key) for key in type_keys}
        reasons: list[str] = []
        by_node = roster.node_to_client()
        passing: dict[str, list[str]] = {key: [] for key in type_keys}
        while waiting:
            asked = {roster.clients[members[0]].node_id: key for key, members in waiting.items()}
            messages = [make_message(content, node, ALIGN, 0, timeout) for node in asked]
            replies = converse(self._grid, messages, timeout)
            problems = dict(replies.failures)
            for message in replies.messages:
                node = message.metadata.src_node_id
                try:
                    reply = AlignReply.from_content(message.content)
                    factors[asked[node]] = reply.factors
                    down[by_node[node]] = content_bytes(content)
                    up[by_node[node]] = content_bytes(message.content)
                except HeteroTuneError as error:
                    problems[node] = str(error)
            reasons += [f"{by_node[node]}: {reason}" for node, reason in sorted(problems.items())]
            for node in replies.passing:
                passing[asked[node]].append(by_node[node])
            waiting = {key: rest[1:] for key, rest in waiting.items() if key not in factors}
            for key in [key for key, rest in waiting.items() if not rest]:
                if not passing[key] or time.monotonic() + AGAIN_SECONDS > deadline:
                    raise FederationError(f"no client of {key} could be aligned; {reasons[0]}")
                time.sleep(AGAIN_SECONDS)
                waiting[key], passing[key] = passing[key], []
        return factors
