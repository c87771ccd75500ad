"""What all strategies of one run share: the clients, described once, and their aligned maps."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from heterotune_flwr.cmga.robust import RobustMean
from heterotune_flwr.cmga.server_optimizers import ServerOptimizer
from heterotune_flwr.data.sources import public_labels
from heterotune_flwr.errors import HeteroTuneError
from heterotune_flwr.federation.checkpoint import Checkpoints
from heterotune_flwr.federation.fitting import Reference, by_node, unfit
from heterotune_flwr.federation.journal import Journal, Pace
from heterotune_flwr.federation.maps_service import Maps, MapsService
from heterotune_flwr.federation.roster import (
    Client,
    LeftOut,
    Need,
    Roster,
    describe_clients,
    without,
)
from heterotune_flwr.federation.simulated import check_size
from heterotune_flwr.federation.symbols_service import SymbolsService, query_seconds
from heterotune_flwr.flower import Grid, is_simulation
from heterotune_flwr.program_version import code_hash
from heterotune_flwr.protocol.messages import Header
from heterotune_flwr.schema import Config, DataConfig, MethodConfig, TrainConfig

__all__ = ["Maps", "Session", "StrategyContext"]

log = logging.getLogger(__name__)
#: Labels that the journal names at most.
_LABELS = 256

#: Settings of training that a client judges when it is asked to train, not yet when it describes itself.
_OF_A_ROUND = (
    "learning_rate", "last_rate", "local_steps", "warmup_ratio", "proximal", "optimizer",
)  # fmt: skip


@dataclass
class Session:
    """One run's view of the federation; rosters and maps are kept for every method asked for.

    With ``checkpoints`` every round is saved; when ``resuming``, a strategy goes on from its last one.
    """

    grid: Grid
    config: Config
    journal: Journal
    run_name: str = "run"
    checkpoints: Checkpoints | None = None
    resuming: bool = False
    _rosters: dict[str, Roster] = field(default_factory=dict)
    _maps: MapsService | None = None
    _symbols: SymbolsService | None = None

    @property
    def minimum(self) -> int:
        """How many clients a run waits for (``server.min_clients``)."""
        if self.config.server.min_clients is not None:
            return max(self.config.server.min_clients, 1)
        return sum(item.clients for item in self.config.types) or 2

    def roster(self, method: MethodConfig, train: TrainConfig, seed: int) -> Roster:
        """Describe all clients; asked once per method, seed and what of ``train`` a description depends on."""
        asked = {name: value for name, value in asdict(train).items() if name not in _OF_A_ROUND}
        key = json.dumps([asdict(method), asked, seed], sort_keys=True)
        if key not in self._rosters:
            symbols = self.config.alignment.output == "vocabulary"
            self.journal.event("asking", seed=seed, needed=self.minimum)
            if is_simulation(self.grid):
                clients = sum(entry.clients for entry in self.config.types)
                check_size(self.grid, clients, self.config.server.wait_seconds)
            roster = describe_clients(
                self.grid,
                Header(f"{self.run_name}-describe", seed, method, train=train),
                symbols,
                Need(
                    self.minimum, self.least, self.config.server.wait_seconds, bool(self._rosters)
                ),
                query_seconds(self.config.server),
                self._unfit(method, symbols),
                self._left_out,
                Pace(self.journal, "asking"),
                Pace(self.journal, "connecting"),
            )
            self._rosters[key] = roster
            self.journal.event(
                "describe",
                clients=len(roster.clients),
                seed=seed,
                members={cid: client.info.type_key for cid, client in roster.clients.items()},
                examples={
                    cid: client.info.train_examples for cid, client in roster.clients.items()
                },
                labels=(roster.labels or [])[:_LABELS],
                types={
                    type_key: {
                        "clients": len(roster.of_type(type_key)),
                        **_type_facts(roster, type_key),
                    }
                    for type_key in roster.type_keys
                },
            )
        return self._rosters[key]

    @property
    def least(self) -> int:
        """How many clients must remain once those that do not fit were left out.

        As many as ``server.min_clients`` says; two where it leaves that open, or a client that lies could end a run.
        """
        return self.minimum if self.config.server.min_clients is not None else min(self.minimum, 2)

    def _unfit(
        self, method: MethodConfig, symbols: bool
    ) -> Callable[[Mapping[str, Client]], dict[str, str]]:
        """Say of clients who cannot take part, by what this server and this run know."""
        reference = Reference(
            method,
            self.config.alignment,
            symbols,
            code_hash(),
            lambda: _known_labels(self.config.data),
            self.maps.weights() if method.kind == "dema" else {},
            self.least,
            is_simulation(self.grid),
        )

        def of(clients: Mapping[str, Client]) -> dict[str, str]:
            infos = {cid: client.info for cid, client in clients.items()}
            order = by_node((client.node_id, cid) for cid, client in clients.items())
            return unfit(infos, order, reference)

        return of

    def without(self, roster: Roster, reasons: Mapping[str, str], needed: int) -> Roster:
        """A roster without some clients, who are put on record (FederationError: too few remain)."""
        return without(roster, reasons, needed, self._left_out)

    def _left_out(self, node: LeftOut) -> None:
        """Put a node that does not take part on record, in the server's log too."""
        log.warning("left out: %s", node)
        self.journal.event(
            "left_out", node_id=str(node.node_id), client_id=node.client_id, reason=node.reason
        )

    @property
    def maps(self) -> MapsService:
        """Computes and remembers the frozen maps."""
        if self._maps is None:
            given = (self.grid, self.config, self.journal, self.run_name, self.symbols)
            self._maps = MapsService(*given)
        return self._maps

    @property
    def symbols(self) -> SymbolsService:
        """Finds and remembers what the types' vocabularies have in common."""
        if self._symbols is None:
            server = self.config.server
            self._symbols = SymbolsService(self.grid, server, self.journal, self.run_name)
        return self._symbols


def _known_labels(data: DataConfig) -> list[str] | None:
    """The run's labels, empty for open text; None where only the clients know them."""
    try:
        found = public_labels(data)
    except HeteroTuneError:  # told by whoever needs the data
        return None
    return [] if found is None and data.max_labels < 1 else found


def _type_facts(roster: Roster, type_key: str) -> dict[str, Any]:
    info = roster.info_of(type_key)
    names = ("bits", "hidden", "layers", "parameters", "model_bytes", "lora16_bytes", "fingerprint")
    return {name: getattr(info, name) for name in names}


@dataclass(frozen=True)
class StrategyContext:
    """What a strategy is built with.

    Attributes
    ----------
    name
        Its name in the configuration; with the seed it names the experiment.
    config
        The run's configuration, with the strategy's own ``method`` and ``train`` settings.
    seed
        The only source of randomness.
    session
        Clients, maps and journal.
    optimizer
        What the server does with a round's combined change; plain addition unless the strategy's entry says otherwise.
    channels
        Options of the channels that are on, by name.
    mean
        How updates shared inside a model type are averaged: weighted by examples, unless the entry says otherwise.

    """

    name: str
    config: Config
    seed: int
    session: Session
    optimizer: ServerOptimizer = ServerOptimizer()
    mean: RobustMean = RobustMean()
    channels: Mapping[str, Any] = field(default_factory=dict)

    @property
    def experiment(self) -> str:
        """Name of this strategy's and seed's private state on the clients."""
        return f"{self.session.run_name}-{self.name}-seed{self.seed}"
