"""The symbols of a run: what the vocabularies of its types have in common, asked for once (:mod:`..data.symbols`).

Where all types have one vocabulary nothing is asked. Elsewhere a client of the smallest one tells its pieces, and one
of every other which of them it knows: a few hundred kilobytes in all, and nothing but public vocabularies in them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.alignment.views import PIECES
from heterotune_flwr.data.symbols import MOST_SYMBOLS, RunSymbols, Symbols, unpack_pieces
from heterotune_flwr.errors import ConfigError, ExchangeError
from heterotune_flwr.exchange.codecs import as_bytes
from heterotune_flwr.exchange.packing import Tensors
from heterotune_flwr.exchange.trees import load_state, save_state
from heterotune_flwr.federation.factors_asked import Asked, Question, ask_types
from heterotune_flwr.federation.journal import Journal, writing
from heterotune_flwr.federation.roster import Roster
from heterotune_flwr.flower import Grid, is_simulation
from heterotune_flwr.protocol.messages import Header
from heterotune_flwr.protocol.queries import AlignRequest, DescribeReply
from heterotune_flwr.protocol.wire import unpack_mask
from heterotune_flwr.schema import MethodConfig, ServerConfig, TrainConfig

Mask = NDArray[np.bool_]


def query_seconds(server: ServerConfig) -> float:
    """How long an answer before the first round is waited for."""
    return server.timeout_seconds if server.query_seconds is None else server.query_seconds


@dataclass
class Found:
    """The symbols of a roster.

    Attributes
    ----------
    symbols
        Which they are.
    knowing
        Identities of the vocabularies that have all of them.
    down, up
        What asking has cost, by client id [bytes].
    lost
        Type -> why it cannot take part.

    """

    symbols: RunSymbols
    knowing: list[str] = field(default_factory=list)
    down: dict[str, int] = field(default_factory=dict)
    up: dict[str, int] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)


class SymbolsService:
    """Finds the symbols of a run, once for all its strategies; a resumed run has those that it began with."""

    def __init__(self, grid: Grid, server: ServerConfig, journal: Journal, run_name: str) -> None:
        self._grid, self._server, self._journal, self._run_name = grid, server, journal, run_name
        self._path = journal.directory / "symbols.safetensors"
        self._done: dict[tuple[tuple[str, str], ...], Found] = {}
        self._masks: dict[tuple[str, RunSymbols], Mask] = {}

    def get(
        self, roster: Roster, method: MethodConfig, train: TrainConfig, seed: int, least: int
    ) -> Found:
        """The symbols of a roster; a type that knows fewer than ``least`` of them is lost.

        Raises ConfigError: the vocabularies have too little in common.
        """
        infos = _of_types(roster)
        key = tuple(sorted((name, info.vocabulary) for name, info in infos.items()))
        if key in self._done:
            return dataclasses.replace(self._done[key], down={}, up={})
        header = Header(f"{self._run_name}-symbols", seed, method, train=train)
        asking = _Asking(self._grid, self._server, roster, header)
        kept = _load(self._path)
        if kept is not None:
            found = self._joined(kept, infos, asking, least)
        else:
            found = _intersection(infos, asking, least)
            with writing(self._path.parent):
                save_state(self._path, _state(found))
        found.down, found.up = asking.down, asking.up
        self._done[key] = found
        self._journal.event(
            "symbols",
            count=found.symbols.count,
            vocabularies=len({info.vocabulary for info in infos.values()}),
            bytes_up=sum(found.up.values()),
        )
        return found

    def known(self, type_key: str, symbols: RunSymbols, roster: Roster, header: Header) -> Mask:
        """Which of some symbols a type knows (ConfigError: its clients do not tell)."""
        info = roster.info_of(type_key)
        if not symbols.packed:
            return np.full(symbols.count, info.vocabulary == symbols.vocabulary)
        if (info.vocabulary, symbols) not in self._masks:
            asking = _Asking(self._grid, self._server, roster, header)
            mask = asking.masks([type_key], symbols.packed, symbols.count).get(type_key)
            if mask is None:
                raise ConfigError(asking.trust.lost[type_key])
            self._masks[info.vocabulary, symbols] = mask
        return self._masks[info.vocabulary, symbols]

    def _joined(
        self, kept: Found, infos: Mapping[str, DescribeReply], asking: _Asking, least: int
    ) -> Found:
        """Hold the types of a roster to the symbols that the run began with."""
        symbols = kept.symbols
        known = dict.fromkeys(kept.knowing, symbols.count)
        new = {info.vocabulary: key for key, info in sorted(infos.items())}
        new = {vocabulary: key for vocabulary, key in new.items() if vocabulary not in known}
        if symbols.packed and new:
            masks = asking.masks(list(new.values()), symbols.packed, symbols.count)
            known |= {infos[key].vocabulary: int(mask.sum()) for key, mask in masks.items()}
        for key, info in infos.items():
            if known.get(info.vocabulary, 0) < min(least, symbols.count):
                kept.lost[key] = (
                    f"the vocabulary of {key} lacks the symbols that this run began with"
                )
        return kept


@dataclass
class _Asking(Asked):
    """Questions about vocabularies to clients of a roster, and what they cost."""

    grid: Grid
    server: ServerConfig
    roster: Roster
    header: Header

    def pieces(self, type_key: str) -> tuple[bytes, ...] | None:
        """All pieces of a type, as its description says them to be; None: its clients do not tell."""
        info = self.roster.info_of(type_key)

        def fault(client_id: str, told: Tensors) -> str:
            try:
                pieces = unpack_pieces(_told(told))
            except ExchangeError as error:
                return str(error)
            same = Symbols(pieces).digest == info.vocabulary and len(pieces) == info.pieces
            return "" if same else "they are not those of the vocabulary that it described"

        told = self._ask([type_key], b"", fault)
        return unpack_pieces(told[type_key]) if type_key in told else None

    def masks(self, type_keys: list[str], packed: bytes, count: int) -> dict[str, Mask]:
        """Which of some packed symbols types know, of those whose clients tell."""

        def fault(client_id: str, told: Tensors) -> str:
            try:
                unpack_mask(_told(told), count)
            except ExchangeError as error:
                return str(error)
            return ""

        told = self._ask(type_keys, packed, fault)
        return {key: unpack_mask(data, count) for key, data in told.items()}

    def _ask(
        self, type_keys: list[str], packed: bytes, fault: Callable[[str, Tensors], str]
    ) -> dict[str, bytes]:
        grid, server = self.grid, self.server
        question = Question(
            AlignRequest(self.header, 1, packed, PIECES).to_content(), fault, self.pay,
            query_seconds(server), server.wait_seconds, 1 if is_simulation(grid) else 2,
        )  # fmt: skip
        told, _ = ask_types(grid, self.roster, type_keys, question, self.trust)
        for key in self.trust.apart & set(told):
            self.trust.lost[key] = f"clients of {key} disagree about its vocabulary"
            del told[key]
        return {key: _told(value) for key, value in told.items()}


def _told(told: Tensors) -> bytes:
    if set(told) != {PIECES}:
        raise ExchangeError(f"what it says of its vocabulary holds {sorted(told)[:3]}")
    return as_bytes(told[PIECES]).tobytes()


def _of_types(roster: Roster) -> dict[str, DescribeReply]:
    """What the first client of every type says."""
    return {key: roster.info_of(key) for key in roster.type_keys}


def _intersection(infos: Mapping[str, DescribeReply], asking: _Asking, least: int) -> Found:
    """What all vocabularies have in common; one that has hardly anything in common with the others is lost."""
    types: dict[str, list[str]] = {}
    for key, info in sorted(infos.items(), key=lambda item: (item[1].pieces, item[1].vocabulary)):
        types.setdefault(info.vocabulary, []).append(key)
    lost: dict[str, str] = {}
    while len(types) > 1:
        (own, (first, *_)), *others = types.items()  # the smallest
        pieces = asking.pieces(first)
        known: dict[str, Mask] = {}
        if pieces is not None:
            asked = {vocabulary: keys[0] for vocabulary, keys in others}
            masks = asking.masks(list(asked.values()), Symbols(pieces).to_bytes(), len(pieces))
            known = {name: masks[key] for name, key in asked.items() if key in masks}
        near = {name: mask for name, mask in known.items() if mask.sum() >= least}
        if pieces is not None and near:
            lost |= _lost(types, set(types) - {own, *near}, asking, least)
            common = np.logical_and.reduce(list(near.values()))
            texts = [text for text, both in zip(pieces, common, strict=True) if both]
            symbols = RunSymbols.of(Symbols(tuple(texts[:MOST_SYMBOLS])))
            return Found(symbols, sorted({own, *near}), lost=lost)
        if len(types) == 2 and pieces is not None and known:
            raise ConfigError(
                f"the vocabularies of {first} and {others[0][1][0]} have too little in common: fewer than {least} "
                "pieces; use models whose tokenizers are nearer to each other"
            )
        lost |= _lost(types, {own}, asking, least)
        del types[own]
    (vocabulary, keys), *_ = types.items()
    symbols = RunSymbols(min(infos[keys[0]].pieces, MOST_SYMBOLS), b"", vocabulary)
    return Found(symbols, [vocabulary], lost=lost)


def _lost(
    types: Mapping[str, list[str]], vocabularies: set[str], asking: _Asking, least: int
) -> dict[str, str]:
    """Why the types of some vocabularies cannot take part."""
    reason = f"its vocabulary has fewer than {least} pieces in common with the others"
    keys = [key for vocabulary in vocabularies for key in types[vocabulary]]
    return {key: asking.trust.lost.get(key, reason) for key in keys}


def _state(found: Found) -> dict[str, Any]:
    symbols = found.symbols
    return {
        "count": symbols.count,
        "packed": np.frombuffer(symbols.packed, np.uint8),
        "vocabulary": symbols.vocabulary,
        "knowing": found.knowing,
    }


def _load(path: Path) -> Found | None:
    if not path.exists():
        return None
    state = load_state(path)
    symbols = RunSymbols(state["count"], state["packed"].tobytes(), state["vocabulary"])
    return Found(symbols, state["knowing"])
