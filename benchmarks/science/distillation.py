"""How much of what all types know together reaches each: teacher and students of ``heterotune_lora``.

One real Flower run (tuning seed 9, without the shared discriminant) on ``embedded12``, or on another of the
headline's suites (``--suite embedded3``: one client per type; its values are kept under the suite's name). Then, from
its last checkpoints, the last round's training is done once more here, and the clients' predictions on the global
test are combined as the server combines those on anchors: that is the teacher nobody holds as one model.
``students``: the models of the run's end. ``entropy``: of the teacher's predictions in nats, quartiles.

Run: ``python -m benchmarks.science.distillation`` (a quarter of an hour; ``--run DIR``: of a run that is there).
Accuracies are on the global test, in percent.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from benchmarks.runner import arguments, flower_run, say, write_results
from benchmarks.science.headline_suites import SUITES, SWEEP_SEED, shipped
from heterotune_flwr.alignment.public_texts import anchor_digest, entropies, load_anchors
from heterotune_flwr.channels.channel import server_half
from heterotune_flwr.channels.predictions.loss import predict
from heterotune_flwr.channels.predictions.options import PredictionOptions
from heterotune_flwr.channels.predictions.record import DistillationRequest
from heterotune_flwr.channels.predictions.server import (
    agreement_weights,
    confidence_weighted_mean,
    sinkhorn_balance,
)
from heterotune_flwr.client.node import Client
from heterotune_flwr.config.compose import compose
from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.sources import global_test
from heterotune_flwr.dema.bank import initial_tensors
from heterotune_flwr.exchange.trees import State, load_state
from heterotune_flwr.flower import Context, RecordDict
from heterotune_flwr.protocol.messages import Header
from heterotune_flwr.strategies.build import strategy_config
from heterotune_flwr.tuning.adapters import AttachedAdapter
from heterotune_flwr.tuning.client_state import ClientStore
from heterotune_flwr.tuning.fit import fit
from heterotune_flwr.tuning.losses import Examples
from heterotune_flwr.tuning.states import Rows, make_rows
from heterotune_flwr.tuning.task import Task

_SUITE, _METHOD = "embedded12", "heterotune_lora"
Array = NDArray[np.float32]


def entry() -> dict[str, Any]:
    """The strategy as it ships, but for the shared discriminant: what is asked is what models learn of each other."""
    found = shipped(_METHOD)
    return {**found, "statistics": None, "method": {**found["method"], "views": []}}


def federated(folder: Path, suite: str) -> None:
    """The run itself, kept in ``folder``."""
    preset = SUITES[suite].compared(suite, {_METHOD: entry()}, [SWEEP_SEED])
    path = folder / "preset.yaml"
    path.write_text(yaml.safe_dump(preset))
    flower_run(str(path), SUITES[suite].overrides(), folder / "run")


class Again:
    """Clients of a finished run, in this process."""

    def __init__(self, run: Path) -> None:
        self.run, self.config = run, compose(str(run / "config.yaml"))
        rounds = self.config.server.rounds
        self.before, self.end = (self._state(number) for number in (rounds - 1, rounds))
        total = sum(entry.clients for entry in self.config.types)
        self.clients = [self._client(number, total) for number in range(total)]
        self.options = server_half("predictions").read(entry()["predictions"])
        self.texts = load_anchors(replace(self.config.alignment, count=self.options.pool))
        self.train = strategy_config(_METHOD, entry(), self.config).train

    def _state(self, number: int) -> State:
        folder = self.run / "checkpoints" / f"{_METHOD}-seed{SWEEP_SEED}"
        return load_state(folder / f"round-{number:06d}.safetensors")

    def _client(self, number: int, total: int) -> Client:
        node = {"partition-id": number, "num-partitions": total}
        run = {"config": str(self.run / "config.yaml")}
        return Client.of(Context(0, number, node, RecordDict(), run))  # type: ignore[arg-type]

    def adapter(self, client: Client, state: State) -> AttachedAdapter:
        """A client's adapter with its type's values and maps."""
        adapter, digest = client.adapter(self.config.method), state["maps"][client.type_key]
        maps = ClientStore(self.run / "state", "distillation", client.client_id).load_maps(digest)
        assert maps is not None, "the run directory lacks its maps"
        adapter.load_maps(maps, digest)
        sent = state["shared"][f"type/{client.type_key}"]
        adapter.load({**initial_tensors(adapter.shapes, SWEEP_SEED), **sent})
        return adapter

    def rows(self, client: Client, adapter: AttachedAdapter, task: Task) -> tuple[Rows, Rows]:
        """The global test's and all anchors'."""
        assert task.labels is not None
        anchors = task.encode([Example(text, task.labels[0]) for text in self.texts])
        test = client.encoded("global", SWEEP_SEED)
        return make_rows(adapter, test, cache=False), make_rows(adapter, anchors, cache=False)

    def request(self, type_key: str) -> DistillationRequest:
        """What the clients of a type were asked in the last round."""
        options, known = self.options, self.before["channels"]["predictions"]["targets"]
        return DistillationRequest(
            anchor_digest(self.texts), options.pool, options.anchors, options.weight,
            known.get(type_key, known.get("")), options.batch, asked=0,
        )  # fmt: skip

    def trained(self, client: Client) -> tuple[Array, Array]:
        """What a client predicts after the last round's training, on the global test and on all anchors."""
        adapter, rounds = self.adapter(client, self.before), self.config.server.rounds
        rate = self.train.learning_rate * self.train.last_rate
        train = replace(self.train, learning_rate=rate)
        header = Header("distillation", SWEEP_SEED, self.config.method, rounds, train)
        client = client.by(header)
        own = client.encoded("train", SWEEP_SEED)
        asked = {"predictions": self.request(client.type_key).to_payload()}
        work = client.work(header, adapter, client.store(header), own, asked)
        examples = Examples(make_rows(adapter, own, cache=False), client.prior(SWEEP_SEED))
        losses = [examples, *work.channels["predictions"].losses()]
        task = work.task
        fit(adapter, task, train, losses, seed=int(client.client_id[-4:]))
        test, anchors = self.rows(client, adapter, task)
        return predict(task, test, range(len(test))), predict(task, anchors, range(len(anchors)))

    def student(self, client: Client) -> Array:
        """What the model of a client's type predicts on the global test at the end."""
        adapter = self.adapter(client, self.end)
        task = adapter.reads(client.task())
        test = make_rows(adapter, client.encoded("global", SWEEP_SEED), cache=False)
        return predict(task, test, range(len(test)))


def percent_right(predictions: Array, truth: NDArray[np.int64]) -> float:
    """Accuracy in percent."""
    return round(100 * float((predictions.argmax(axis=1) == truth).mean()), 1)


def entropy_quartiles(predictions: Array) -> list[float]:
    """Of the predictions' entropies, in nats."""
    quartiles = np.quantile(entropies(predictions), (0.25, 0.5, 0.75))
    return [round(float(value), 2) for value in quartiles]


def combined(
    predictions: list[Array], shares: list[float], options: PredictionOptions
) -> NDArray[np.float32]:
    """As the server combines them."""
    mean, _ = confidence_weighted_mean(predictions, shares, options.entropy_power)
    return sinkhorn_balance(mean, options.balance).astype(np.float32)


def measure(run: Path) -> dict[str, Any]:
    """All accuracies."""
    again = Again(run)
    labels = again.clients[0].task().labels or []
    examples = global_test(again.config.data)
    truth = np.array([labels.index(example.label) for example in examples])
    said: dict[str, tuple[Array, Array]] = {}
    for client in again.clients:
        said[client.client_id] = again.trained(client)
        found = percent_right(said[client.client_id][0], truth)
        say(f"{client.client_id} ({client.type_key}) after its training: {found} %")
    tests, anchors = [s[0] for s in said.values()], [s[1] for s in said.values()]
    shares = agreement_weights(anchors, again.options.agreement_power)
    options = again.options
    teacher, targets = (combined(said_of, shares, options) for said_of in (tests, anchors))
    values: dict[str, Any] = {
        "seeds": [SWEEP_SEED],
        "clients": round(float(np.mean([percent_right(test, truth) for test in tests])), 1),
        "teacher": percent_right(teacher, truth),
        "entropy.anchors": entropy_quartiles(targets),
        "entropy.test": entropy_quartiles(teacher),
    }
    kinds = {client.type_key: client for client in again.clients}
    students = {kind: again.student(client) for kind, client in kinds.items()}
    for kind, student in students.items():
        own = [said[c.client_id][0] for c in again.clients if c.type_key == kind]
        values[f"student.{kind}"] = percent_right(student, truth)
        values[f"teacher.{kind}"] = percent_right(
            combined(own, [1 / len(own)] * len(own), options), truth
        )
    values["students"] = round(
        float(np.mean([percent_right(s, truth) for s in students.values()])), 1
    )
    return values


def main() -> None:
    parser = arguments(__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--run", type=Path, help="directory this command's run was kept in")
    which.add_argument("--suite", default=_SUITE, choices=SUITES, help="of the headline")
    args = parser.parse_args()
    run = args.run
    if run is None:
        folder = Path(mkdtemp(prefix="heterotune-distillation-"))
        federated(folder, args.suite)
        run = folder / "run"
        say(f"the run is kept in {run}")
    suite = compose(str(run / "config.yaml")).run.name  # its own, of whatever run it is
    if suite not in SUITES:
        parser.error(f"{run} holds a run named {suite}, which is none of this command's")
    torch.set_num_threads(os.cpu_count() or 1)
    values = measure(run)
    say(values)
    if suite != _SUITE:
        values = {"seeds": values.pop("seeds"), suite: values}
    write_results("distillation", values)


if __name__ == "__main__":
    main()
