"""A client's training on its own examples: a round of a run, all its rounds without the others, rounds after them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from heterotune_flwr.channels.client_half import ClientWork
from heterotune_flwr.client.identity import Identity
from heterotune_flwr.client.node import Client
from heterotune_flwr.dema.bank import initial_tensors
from heterotune_flwr.exchange.packing import Tensors, tensor_digest
from heterotune_flwr.exchange.storage import atomic_write_text
from heterotune_flwr.jsons import parse_json
from heterotune_flwr.program_version import code_hash
from heterotune_flwr.protocol.messages import Header
from heterotune_flwr.schema import TrainConfig
from heterotune_flwr.seeds import generator
from heterotune_flwr.tuning.adapters import AttachedAdapter
from heterotune_flwr.tuning.client_state import ClientStore
from heterotune_flwr.tuning.fit import TrainReport, fit
from heterotune_flwr.tuning.losses import Examples, installed_losses
from heterotune_flwr.tuning.slots import lowest_slot
from heterotune_flwr.tuning.states import make_rows
from heterotune_flwr.tuning.task import EncodedSet, Task

log = logging.getLogger(__name__)


def train_round(
    client: Client,
    header: Header,
    adapter: AttachedAdapter,
    task: Task,
    encoded: EncodedSet,
    work: ClientWork | None = None,
) -> TrainReport:
    """Train the adapter in place by the header's settings; ``work`` has the channels that take part."""
    aside, size = client.guard.steps(len(encoded))
    settings = replace(header.train, batch_size=size)
    rows = make_rows(adapter, encoded, settings.cache_states)
    most = client.guard.most_loss(own=True)
    examples = Examples(rows, client.prior(header.seed), most, aside)
    further = installed_losses(settings.losses, examples, adapter)
    terms = work.each(lambda half: half.losses()) if work else {}
    gradients = work.each(lambda half: half.gradients()) if work else {}
    return fit(
        adapter,
        task,
        settings,
        [examples, *(term for one in terms.values() for term in one), *further],
        [term for one in gradients.values() for term in one],
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
    """What a round asked of a client's training: its number, all its settings, and the tensors that were held fixed."""

    number: int
    train: dict[str, Any]
    frozen: list[str]


class RoundLog:
    """The rounds that a client has trained in, in a file beside its state: they can be trained again, alone.

    They are those of one adapter, seed and maps; a run with others begins anew. The file also says of which training
    the kept models are.
    """

    def __init__(self, store: ClientStore, header: Header, maps_digest: str) -> None:
        self._path: Path = store.part("rounds").path.with_suffix(".json")
        self._until = header.round
        self._of = _digest([header.seed, asdict(header.method), maps_digest])

    def read(self) -> list[Round]:
        """All rounds up to the header's; none where the file is damaged or gone, as nothing else depends on it."""
        return self._read()[0]

    def add(self, trained: Round) -> None:
        """Note a round; of later ones, which a run that begins anew leaves behind, nothing stays."""
        entries = [each for each in self.read() if each.number < trained.number]
        self._write([*entries, trained], {})

    def keep(self, model: str, training: str, tensors: Tensors) -> None:
        """Note of which training (:func:`alone_training`, :func:`own_training`) a kept model is."""
        rounds, kept = self._read()
        self._write(rounds, {**kept, model: [training, tensor_digest(tensors)]})

    def is_kept(self, model: str, training: str, tensors: Tensors | None) -> bool:
        """Whether these tensors are what this training of a model came to."""
        of = self._read()[1].get(model)
        return tensors is not None and of == [training, tensor_digest(tensors)]

    def _read(self) -> tuple[list[Round], dict[str, list[str]]]:
        try:
            held = parse_json(self._path.read_text())
            if held["of"] != self._of:
                return [], {}
            rounds = [Round(*entry) for entry in held["rounds"]]
            kept = dict(held.get("kept", {}))
            return [each for each in rounds if each.number <= self._until], kept
        except FileNotFoundError:
            return [], {}
        except (OSError, ValueError, TypeError, KeyError) as error:
            log.warning(
                "%s cannot be read (%s): this client trains no model alone", self._path, error
            )
            return [], {}

    def _write(self, rounds: list[Round], kept: dict[str, list[str]]) -> None:
        held = {"of": self._of, "rounds": rounds, "kept": kept}
        atomic_write_text(self._path, json.dumps(held) + "\n")


def alone_training(
    client: Client, header: Header, adapter: AttachedAdapter, rounds: Sequence[Round]
) -> str:
    """Digest of all that a training alone depends on besides the maps (hex)."""
    identity = client.identity
    data = [*identity.examples_key(header.seed), identity.stamp(identity.data.train or "")]
    return _digest(
        [
            code_hash(), client.backbone.fingerprint, asdict(adapter.method), identity.slots, header.seed,
            asdict(identity.data), data, identity.floors and asdict(identity.floors), rounds,
        ]
    )  # fmt: skip


def train_alone(
    client: Client, header: Header, adapter: AttachedAdapter, rounds: Iterable[Round]
) -> Tensors:
    """The adapter that this client would have had alone, and leave it in place.

    The same maps, first values, examples and settings as in the run's rounds, without channels and without anything
    of others.
    """
    adapter.load(initial_tensors(adapter.shapes, header.seed))
    for each in rounds:
        _train_as_in(client, header, adapter, each)
    return adapter.read()


def own_training(alone: str, shared: Tensors, channels: Mapping[str, str]) -> str:
    """Digest of all that own rounds, and their choice, depend on (hex).

    ``alone``: of the training alone (:func:`alone_training`); ``channels``: digest of what each was asked.
    """
    return _digest([alone, tensor_digest(shared), channels])


def own_rounds(
    client: Client, header: Header, adapter: AttachedAdapter, last: Round, most: int
) -> Iterator[Tensors]:
    """The adapter's values as they are, then after each of up to ``most`` further rounds on own examples alone.

    They go on after the run's, by the settings of the ``last`` one this client trained in; the adapter holds each.
    """
    yield adapter.read()
    for number in range(header.round + 1, header.round + 1 + most):
        _train_as_in(client, header, adapter, last._replace(number=number))
        yield adapter.read()


def _train_as_in(client: Client, header: Header, adapter: AttachedAdapter, each: Round) -> None:
    """Train in place by a round's settings, without channels and without anything of others."""
    usual = adapter.lowest
    asked = replace(header, round=each.number, train=TrainConfig(**each.train))
    one = client.by(asked)
    slots = client.identity.slots or asked.train.slots
    adapter.train_from(lowest_slot(slots, adapter.method.slots), each.frozen)
    encoded = one.encoded("train", header.seed)
    train_round(one, asked, adapter, adapter.reads(one.task()), encoded)
    adapter.train_from(usual)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
