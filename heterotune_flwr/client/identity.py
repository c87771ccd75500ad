"""Who a client is: its id, backbone, data and state directory, and what of it may leave (no torch here)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from heterotune_flwr.alignment.public_texts import SHIPPED
from heterotune_flwr.backbones.sources import BackboneSpec
from heterotune_flwr.client.floors import MOST_HELD, MOST_LOSS, Floors
from heterotune_flwr.client.holdout import split, whole_test
from heterotune_flwr.client.node_book import NodeBook
from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.partition import ClientData, Owners, client_examples, own_examples
from heterotune_flwr.data.sources import global_test, is_shipped
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.protocol.details import TEXTS
from heterotune_flwr.protocol.metrics import metric_of
from heterotune_flwr.schema import (
    NATURAL_INSTRUCTIONS,
    AlignmentConfig,
    Config,
    DataConfig,
)

#: Examples of a class that a deployed client's sum is of at least: that of one would be the example's own latents.
FEWEST = 2
#: What always leaves: the server weighs and checks updates by the first three.
COUNTED = ("examples", "steps", "learning_rate", "loss")


@dataclass(frozen=True)
class Identity:
    """A client of a run.

    ``data`` is the run's data configuration with this client's own files in it; ``partition`` is
    (partition id, number of partitions) in a simulation, None in a deployment; ``owners`` are the natural clients that
    a simulation's types name. ``answers``: whether what its model writes on public prompts may leave it,
    ``class_sums``: whether its classes' counts and sums may, ``details``: what of its last test a report may show; a
    deployed client's owner must say so. ``losses``: further losses that a run may use, None: all. ``guest``: it trains
    on no example of its own. ``floors``: what a deployed client holds to, None in a simulation.
    """

    client_id: str
    spec: BackboneSpec
    data: DataConfig
    state_dir: Path
    partition: tuple[int, int] | None = None
    owners: Owners = ()
    threads: int = 1
    anchors: str | None = None
    memory_gb: float | None = None
    slots: str | None = None
    report: str = "all"
    answers: bool = True
    class_sums: bool = True
    losses: tuple[str, ...] | None = None
    details: str = TEXTS
    guest: bool = False
    floors: Floors | None = None

    def reported(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics this client lets go; of tests (``personal_loss``, ...) likewise counts and losses."""
        if self.report == "all":
            return dict(metrics)
        return {
            name: value for name, value in metrics.items() if metric_of(name).measure in COUNTED
        }

    def tells_loss(self, examples: int) -> float | None:
        """Return what a single loss may count for in a mean over so many own examples that is told; None: tell none."""
        if self.floors is None:
            return math.inf
        return MOST_LOSS if examples >= self.floors.test_examples else None

    def allowed_min_count(self, requested: int) -> int:
        """Return of which classes the server may know, by their fewest examples; 0: of none, the owner forbids it.

        A deployed client never tells of fewer than :data:`FEWEST`, whatever is asked.
        """
        if not self.class_sums or requested < 1:
            return 0
        return requested if self.partition is not None else max(requested, FEWEST)

    def tells(self, detail: str) -> bool:
        """Whether ``counts``, or ``texts``, of its last test may leave this client for a run's report."""
        return self.report == "all" and self.details in (detail, TEXTS)

    def alignment(self, config: Config) -> AlignmentConfig:
        """Alignment settings with this client's own anchor file in them.

        Raises
        ------
        ConfigError
            The run names an anchor file and this deployed client has not agreed to one.

        """
        if self.anchors is not None:
            return dataclasses.replace(config.alignment, anchors=self.anchors)
        if self.partition is None and config.alignment.anchors not in SHIPPED:
            need = (
                "a deployed client reads no path from the server: name the file with anchors in its node "
                f"configuration, or take one of {', '.join(SHIPPED)}"
            )
            raise ConfigError(
                f"the run aligns on the anchor file {config.alignment.anchors!r}; {need}",
                f"alignment.anchors: {need}",
            )
        return config.alignment

    def global_test(self) -> list[Example]:
        """Return the run's common test; nothing where a deployed client has none (DataError as in :mod:`..data`).

        A deployed client's is its own test file, of which a run chooses no rows (:mod:`.holdout`); without one the
        shipped test, where the run is about a shipped set.
        """
        data = self.data
        if self.partition is not None or data.name == NATURAL_INSTRUCTIONS:
            return global_test(data)
        if data.test is not None:
            found = global_test(dataclasses.replace(data, generate=MOST_HELD))
            return whole_test(found, self.account(data.test), self.book, self.floors or Floors())
        if not is_shipped(data.name):
            return []
        return global_test(
            DataConfig(
                name=data.name,
                labels=data.labels,
                max_labels=data.max_labels,
                global_test_examples=data.global_test_examples,
            )
        )

    def examples(self, seed: int) -> ClientData:
        """Return the client's own examples for a run's seed (DataError as in :mod:`..data`).

        A guest trains on none: in a simulation those it would have lie idle, so that the others' are the same with and
        without it; a deployed one's file, where it has any, is its own test. A deployed client's split is its own, for
        every run and seed the same (:mod:`.holdout`).
        """
        if self.partition is not None:
            found = client_examples(self.data, *self.partition, seed, self.owners)
            return dataclasses.replace(found, train=[]) if self.guest else found
        if self.data.train is None:
            return ClientData([], [])
        pool = own_examples(self.data)
        account = self.account(self.data.train)
        return split(pool, account, self.book, self.floors or Floors(), self.guest)

    def examples_key(self, seed: int) -> tuple[str, ...]:
        """What :meth:`examples` depends on, the settings in ``data`` apart."""
        if self.partition is not None or self.data.train is None:
            return (self.client_id, repr((self.partition, self.owners)), str(seed), str(self.guest))
        return (self.client_id, str(self.state_dir), self.stamp(self.data.train), str(self.guest))

    @cached_property
    def book(self) -> NodeBook:
        """What this deployed client must not forget."""
        return NodeBook(self.state_dir)

    def stamp(self, path: str) -> str:
        """When a file of this client was last written; empty where it is not there."""
        file = Path(path).expanduser()
        return str(file.stat().st_mtime_ns) if file.exists() else ""

    def account(self, path: str) -> str:
        """Under which name the book counts what is asked about a file: one that says nothing of where it lies."""
        return self.book.keyed(f"file {Path(path).expanduser().resolve()}")
