"""A client's training on its own examples: one round of a run, or all of its rounds once more without the others."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from heterotune_flwr.channels.client_half import ClientChannel
from heterotune_flwr.client.identity import Identity
from heterotune_flwr.client.node import Client
from heterotune_flwr.dema.bank import initial_tensors
from heterotune_flwr.exchange.packing import Tensors
from heterotune_flwr.exchange.storage import atomic_write_text
from heterotune_flwr.jsons import parse_json
from heterotune_flwr.protocol.messages import Header
from heterotune_flwr.seeds import generator
from heterotune_flwr.tuning.adapters import AttachedAdapter
from heterotune_flwr.tuning.client_state import ClientStore
from heterotune_flwr.tuning.fit import TrainReport, fit
from heterotune_flwr.tuning.losses import Examples, installed_losses
from heterotune_flwr.tuning.states import make_rows
from heterotune_flwr.tuning.task import EncodedSet, Task

log = logging.getLogger(__name__)


def train_round(
    client: Client,
    header: Header,
    adapter: AttachedAdapter,
    task: Task,
    encoded: EncodedSet,
    halves: Collection[ClientChannel] = (),
) -> TrainReport:
    """Train the adapter in place by the header's settings; ``halves`` are the channels that take part."""
    aside, size = client.guard.steps(len(encoded))
    settings = replace(header.train, batch_size=size)
    rows = make_rows(adapter, encoded, settings.cache_states)
    most = client.guard.most_loss(own=True)
    examples = Examples(rows, client.prior(header.seed), most, aside)
    further = installed_losses(settings.losses, examples, adapter)
    return fit(
        adapter,
        task,
        settings,
        [examples, *(term for half in halves for term in half.losses()), *further],
        [term for half in halves for term in half.gradients()],
        seed=_step_seed(header, client.identity, [size, settings.local_steps]),
        memory_gb=client.identity.memory_gb,
    )


def _step_seed(header: Header, identity: Identity, steps: Sequence[int]) -> int:
    """Seed of this client's batches and dropout in this round: no state, so resume is exact.

    Of a deployed client the server does not know it, and trainings in steps of another size or number have seeds that
    have nothing to do with one another: 32 and 33 rows in one order would tell one row's gradient.
    """
    name = f"train.{identity.client_id}.{header.round}"
    if identity.floors is not None:
        name = identity.book.keyed(f"{name} {list(steps)}")
    return int(generator(header.seed, name).integers(2**62))


class Round(NamedTuple):
    """What a round asked of a client's training: its number, steps, rate, and the tensors that were held fixed."""

    number: int
    steps: int
    rate: float
    frozen: list[str]


class RoundLog:
    """The rounds that a client has trained in, in a file beside its state: they can be trained again, alone."""

    def __init__(self, store: ClientStore) -> None:
        self._path: Path = store.part("rounds").path.with_suffix(".json")

    def read(self) -> list[Round]:
        """All rounds so far, in order; none where the file is damaged or gone, as nothing else depends on it."""
        try:
            return [Round(*entry) for entry in parse_json(self._path.read_text())]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError) as error:
            log.warning(
                "%s cannot be read (%s): this client trains no model alone", self._path, error
            )
            return []

    def add(self, trained: Round) -> None:
        """Note a round; of later ones, which a run that begins anew leaves behind, nothing stays."""
        entries = [each for each in self.read() if each.number < trained.number]
        atomic_write_text(self._path, json.dumps([*entries, trained]) + "\n")


def train_alone(
    client: Client, header: Header, adapter: AttachedAdapter, task: Task, rounds: Iterable[Round]
) -> Tensors | None:
    """The adapter that this client would have had alone, and leave it in place; None where it has trained in no round.

    The same maps, first values, examples, batches, steps and rates as in the run, without channels and without anything
    of others.
    """
    encoded = client.encoded("train", header.seed)
    done = [each for each in rounds if each.number <= header.round]
    if adapter.kind != "dema" or not len(encoded) or not done:
        return None
    adapter.load(initial_tensors(adapter.shapes, header.seed))
    for each in done:
        adapter.train_from(adapter.lowest, each.frozen)
        settings = replace(header.train, local_steps=each.steps, learning_rate=each.rate)
        asked = replace(header, round=each.number, train=settings)
        train_round(client, asked, adapter, task, encoded)
    return adapter.read()
