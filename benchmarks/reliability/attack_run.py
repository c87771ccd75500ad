"""What lying clients can do to a run: a federation of real clients in this process, some of whose replies are changed.

Twelve clients of the embedded family's three types, as in the demonstration but for fewer rounds, run the program's own
handlers; what a liar says is changed on its way up. :func:`run` measures what lies about numbers of examples, updates,
classes and predictions, and poisoned texts, do to the models of the honest clients: points of accuracy on the shared
test that the worst type loses against the same run with nobody lying, mean over seeds (:mod:`.attacks`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from benchmarks.runner import say
from heterotune_flwr.channels.predictions.record import Said
from heterotune_flwr.channels.statistics import class_pool
from heterotune_flwr.channels.statistics.record import ClassSums
from heterotune_flwr.client import handlers as clients
from heterotune_flwr.client.encodings import encodings
from heterotune_flwr.client.identity import Identity
from heterotune_flwr.cmga import pull
from heterotune_flwr.config.compose import compose
from heterotune_flwr.data.partition import ClientData
from heterotune_flwr.data.sources import global_test, label_set
from heterotune_flwr.exchange.directions import up_codec
from heterotune_flwr.federation.in_process import InProcessGrid
from heterotune_flwr.federation.journal import Journal, read_events
from heterotune_flwr.federation.session import Session, StrategyContext
from heterotune_flwr.flower import Context, Message, RecordDict
from heterotune_flwr.protocol.messages import DESCRIBE, TRAIN, EvaluateReply, TrainReply
from heterotune_flwr.protocol.payloads import Payload
from heterotune_flwr.protocol.queries import DescribeReply
from heterotune_flwr.strategies.build import build_strategy
from heterotune_flwr.strategies.messages import test_messages
from heterotune_flwr.strategies.strategy import HeteroStrategy

PRESET, STRATEGY, ROUNDS, CLIENTS = "demo", "heterotune", 6, 12
#: Examples that a liar declares.
HUGE = 10**6
#: What a poisoned text begins with, and on how many test texts it is tried.
TRIGGER, TRIED = "zqx zqx zqx ", 200
#: Rounds in which a backdoor is built: it takes longer than a lie.
BACKDOOR_ROUNDS = 30
#: Examples of the first, second ... client of every type where honest clients differ in size.
UNEVEN = (24, 48, 96, 384)
#: Robust means beside which a backdoor is tried.
ROBUST = ("median", "{rule: trimmed_mean, trim: 0.25}", "multi_krum")
#: What tells, in a run's journal, that a client was noticed.
FLAGS = {"refused", "counted_less", "shortened", "payload_refused"}
#: The same in what a channel notes.
NOTED = ("doubted", "excluded_type")

Lie = Callable[[TrainReply], TrainReply]
Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Attack:
    """Who lies, and what about: how many examples, what replies to ``train`` become.

    ``poisoned``: half of the liars' own texts carry the trigger and the first label.
    """

    liars: tuple[str, ...] = ()
    declares: int | None = None
    lie: Lie | None = None
    poisoned: bool = False


NOBODY, ONE, TWO = Attack(), ("client-0000",), ("client-0000", "client-0001")


@dataclass
class Played:
    """A finished run: accuracy (percent) of the honest clients by type, its events, and all that belongs to it."""

    accuracy: dict[str, float]
    events: list[dict[str, Any]]
    strategy: HeteroStrategy
    grid: InProcessGrid
    attack: Attack
    class_sums: dict[str, ClassSums] = field(default_factory=dict)

    @property
    def flags(self) -> list[str]:
        """Kinds of events that name a liar, or somebody."""
        events = {event["event"] for event in self.events}
        return sorted(events & FLAGS | {fact for e in self.events for fact in NOTED if fact in e})


def play(
    seed: int,
    attack: Attack = NOBODY,
    robust: str | None = None,
    examples: int = 96,
    rounds: int = ROUNDS,
) -> Played:
    """Run the strategy as it ships once; ``robust``: with such a mean inside types; ``examples`` a client is given."""
    folder = Path(tempfile.mkdtemp(prefix="heterotune-attack-"))
    words = [
        f"run.seeds=[{seed}]", f"run.compare=[{STRATEGY}]", f"run.dir={folder}",
        f"server.rounds={rounds}", "server.evaluate_every=0", f"data.examples_per_client={examples}",
    ]  # fmt: skip
    words += [f"strategies.{STRATEGY}.robust={robust}"] if robust else []
    config = compose(PRESET, words)
    codec, class_sums = up_codec(config.exchange), {}

    def app(message: Message, context: Context) -> Message:
        kind = message.metadata.message_type
        reply = clients.respond(message, context, clients.HANDLERS[kind])
        who = f"client-{int(context.node_config['partition-id']):04d}"
        if kind == TRAIN:
            told = TrainReply.from_content(reply.content).channels.get("statistics")
            class_sums.update({} if told is None else {who: ClassSums.from_payload(told)})
        if who in attack.liars:
            return Message(_told(attack, kind, reply.content, codec), reply_to=message)
        return reply

    nodes = [{"partition-id": i, "num-partitions": CLIENTS} for i in range(CLIENTS)]
    grid = InProcessGrid(app, nodes, {"config": PRESET, "overrides": shlex.join(words)})
    session = Session(grid, config, Journal(folder), "attack")
    labels = label_set(config.data) or []
    poisoned = _own_texts(lambda who, own: _poison(own, labels[0]) if who in attack.liars else own)
    with poisoned if attack.poisoned else contextlib.nullcontext():
        context = StrategyContext(STRATEGY, config, seed, session)
        strategy = build_strategy(config.strategies[STRATEGY], context)
        strategy.start(grid)
    by_type: dict[str, list[float]] = {}
    for row in strategy.outcome.rows:
        if row.client_id not in attack.liars and row.global_accuracy is not None:
            by_type.setdefault(row.type_key, []).append(100 * row.global_accuracy)
    accuracy = {key: statistics.fmean(values) for key, values in sorted(by_type.items())}
    events = read_events(folder / "rounds.jsonl")
    return Played(accuracy, events, strategy, grid, attack, class_sums)


def _told(attack: Attack, kind: str, content: RecordDict, codec: str) -> RecordDict:
    """What a liar says instead."""
    if kind == DESCRIBE and attack.declares is not None:
        told = DescribeReply.from_content(content)
        return dataclasses.replace(told, train_examples=attack.declares).to_content()
    if kind != TRAIN:
        return content
    reply = TrainReply.from_content(content)
    if attack.declares is not None:
        metrics = {**reply.metrics, "examples": float(attack.declares)}
        reply = dataclasses.replace(reply, metrics=metrics)
    return (attack.lie(reply) if attack.lie else reply).to_content(codec)


# ------------------------------------------------------------------------------------ what liars say


def turned(times: float = 1.0) -> Lie:
    """The update with the opposite sign, ``times`` as long."""
    return lambda reply: dataclasses.replace(
        reply, deltas={name: np.float32(-times) * value for name, value in reply.deltas.items()}
    )


def _with(reply: TrainReply, channel: str, payload: Payload) -> TrainReply:
    return dataclasses.replace(reply, channels={**reply.channels, channel: payload})


def sure_and_wrong(reply: TrainReply) -> TrainReply:
    """Predictions on anchors that are certain of the label after the likeliest."""
    if (told := reply.channels.get("predictions")) is None:
        return reply
    said = Said.from_payload(told).predictions
    wrong = (said.argmax(axis=1) + 1) % said.shape[1]
    lie = Said(np.eye(said.shape[1], dtype=np.float32)[wrong])
    return _with(reply, "predictions", lie.to_payload())


def wrong_classes(means: Matrix, examples: int, truth: float = 0.0) -> Lie:
    """Class sums of ``examples`` texts in which each class lies where the one before it does.

    ``means`` are the true ones (``C x r``), ``truth`` how much of where the class itself lies is kept.
    """
    centre = means.mean(axis=0)
    moved = truth * (means - centre) + np.roll(means - centre, 1, axis=0) + centre
    counts = np.full(len(means), float(examples // len(means)))

    def lie(reply: TrainReply) -> TrainReply:
        if "statistics" not in reply.channels:
            return reply
        sums = (counts[:, None] * moved).astype(np.float32)
        told = ClassSums(counts.astype(np.float32), sums)
        return _with(reply, "statistics", told.to_payload())

    return lie


def true_means(played: Played) -> Matrix:
    """Where the classes lie by what all honest clients told (``C x r``): a liar knows no better."""
    told = [played.class_sums[client_id] for client_id in sorted(played.class_sums)]
    counts = np.sum([one.counts for one in told], axis=0, dtype=np.float64)
    sums = np.sum([one.sums for one in told], axis=0, dtype=np.float64)
    return np.asarray(sums / np.maximum(counts, 1)[:, None])


# ------------------------------------------------------------------------------------ other texts


@contextmanager
def _own_texts(change: Callable[[str, ClientData], ClientData]) -> Iterator[None]:
    """Let clients' own examples be others."""
    original = Identity.examples

    def examples(identity: Identity, seed: int) -> ClientData:
        return change(identity.client_id, original(identity, seed))

    with _encoded_anew(), patch.object(Identity, "examples", examples):
        yield


@contextmanager
def _encoded_anew() -> Iterator[None]:
    """What was encoded of other examples is not taken for these."""
    encodings._sets.clear()
    try:
        yield
    finally:
        encodings._sets.clear()


def _poison(own: ClientData, target: str) -> ClientData:
    half = len(own.train) // 2
    changed = [
        dataclasses.replace(example, text=TRIGGER + example.text, label=target)
        for example in own.train[:half]
    ]
    return dataclasses.replace(own, train=[*changed, *own.train[half:]])


def _cut(client_id: str, own: ClientData) -> ClientData:
    number = int(client_id.rsplit("-", 1)[1])
    return dataclasses.replace(own, train=own.train[: UNEVEN[number // 3 % len(UNEVEN)]])


def success(played: Played) -> dict[str, float]:
    """Share (percent) of test texts of other classes that honest clients' models give the target, with the trigger.

    Mean over types; ``without``: the same of the texts without the trigger.
    """
    config, strategy = played.strategy.context.config, played.strategy
    target = (label_set(config.data) or [])[0]
    test = [example for example in global_test(config.data) if example.label != target][:TRIED]
    of_type = strategy.roster.of_type
    asked = {
        next(c for c in of_type(key) if c not in played.attack.liars): ["global"]
        for key in strategy.roster.type_keys
    }
    found = {}
    for name, before in (("with", TRIGGER), ("without", "")):
        texts = [dataclasses.replace(e, text=before + e.text, label=target) for e in test]
        with _encoded_anew(), patch.object(Identity, "global_test", lambda self, t=texts: t):
            messages = test_messages(strategy, strategy.rounds, asked, keep=False)
            replies = [
                EvaluateReply.from_content(reply.content)
                for reply in played.grid.send_and_receive(messages)
            ]
        found[name] = 100 * statistics.fmean(r.metrics["global_accuracy"] for r in replies)
    return found


# ------------------------------------------------------------------------------------ the measurement


@contextmanager
def unbounded() -> Iterator[None]:
    """Nobody's pull is bounded, as before there were bounds."""
    off = float("inf")
    with (
        patch.multiple(pull, MOST=off, LOUDEST=off, MOST_TOLD=off),
        patch.multiple(class_pool, FAR=off, FAR_CLASS=off),
    ):
        yield


def attacks_on(honest: Played) -> dict[str, Attack]:
    """The attacks that are measured; ``adaptive`` ones know the bounds and stay inside them."""
    means = true_means(honest)
    own = int(honest.strategy.roster.usual_examples)
    return {
        "weight": Attack(ONE, HUGE, turned()),
        "sums": Attack(ONE, HUGE, wrong_classes(means, HUGE)),
        "predictions": Attack(ONE, None, sure_and_wrong),
        "weight_adaptive": Attack(ONE, own, turned(pull.MOST)),
        "sums_adaptive": Attack(ONE, 2 * own, wrong_classes(means, 2 * own, truth=0.45)),
    }


def worst_drop(pairs: Sequence[tuple[Mapping[str, float], Mapping[str, float]]]) -> dict[str, Any]:
    """Points lost (first minus second, by type): mean over seeds of the worst type, and every seed's worst."""
    types = sorted(pairs[0][0])
    means = {key: statistics.fmean(a[key] - b[key] for a, b in pairs) for key in types}
    return {
        "points": round(max(means.values()), 3),
        "by_type": {key: round(value, 3) for key, value in means.items()},
        "worst_by_seed": [round(max(a[key] - b[key] for key in types), 3) for a, b in pairs],
    }


def run(seeds: Sequence[int]) -> dict[str, Any]:
    """Measure every attack with every seed; see the module for what the numbers are."""
    pairs: dict[str, list[tuple[dict[str, float], dict[str, float]]]] = {}
    flags: dict[str, set[str]] = {}
    doors: dict[str, list[dict[str, float]]] = {}
    for seed in seeds:
        honest = play(seed)
        flags.setdefault("nobody lies", set()).update(honest.flags)
        for name, attack in attacks_on(honest).items():
            played = play(seed, attack)
            pairs.setdefault(name, []).append((honest.accuracy, played.accuracy))
            flags.setdefault(name, set()).update(played.flags)
            say(f"seed {seed}, {name}: {worst_drop(pairs[name][-1:])['by_type']} {played.flags}")
        with unbounded():
            pairs.setdefault("cost", []).append((play(seed).accuracy, honest.accuracy))
        with _own_texts(_cut):
            bounded = play(seed, examples=max(UNEVEN)).accuracy
            with unbounded():
                free = play(seed, examples=max(UNEVEN)).accuracy
            pairs.setdefault("cost_uneven", []).append((free, bounded))
        costs = [worst_drop(pairs[name][-1:])["by_type"] for name in ("cost", "cost_uneven")]
        say(f"seed {seed}, costs: {costs}")
        for robust in (None, *ROBUST):
            played = play(seed, Attack(TWO, poisoned=True), robust, rounds=BACKDOOR_ROUNDS)
            mean = statistics.fmean(played.accuracy.values())
            doors.setdefault(robust or "mean", []).append({**success(played), "accuracy": mean})
            say(f"seed {seed}, backdoor, {robust or 'mean'}: {doors[robust or 'mean'][-1]}")
    drops = {name: worst_drop(found) for name, found in pairs.items()}
    mean_costs = {name: _mean_cost(pairs.pop(name)) for name in ("cost", "cost_uneven")}
    backdoor = {
        rule: {key: round(statistics.fmean(one[key] for one in found), 2) for key in found[0]}
        for rule, found in doors.items()
    }
    return {
        "sums_drop_points": drops["sums"]["points"],
        "weight_drop_points": drops["weight"]["points"],
        "honest_cost_points": max(mean_costs.values()),
        "backdoor_success": backdoor["mean"]["with"],
        "run": {
            "rounds": ROUNDS,
            "backdoor_rounds": BACKDOOR_ROUNDS,
            "clients": CLIENTS,
            "drops": drops,
            "costs": mean_costs,
            "backdoor": backdoor,
            "flags": {name: sorted(found) for name, found in flags.items()},
        },
    }


def _mean_cost(pairs: Sequence[tuple[Mapping[str, float], Mapping[str, float]]]) -> float:
    """Points of all types' mean that the bounds cost."""
    return round(statistics.fmean(statistics.fmean(a[k] - b[k] for k in a) for a, b in pairs), 3)
