"""One fault case: a strategy, a fault, two hostile clients of ten; and the same run without those two."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass

from fault_federation import SHIPPED, Ended, run, toy_spec
from wire_faults import FAULTS, Hostile

#: Two clients of the type that has three, and two clients of two types.
PLACES = {"one type": ("client-0001", "client-0004"), "two types": ("client-0003", "client-0005")}
#: What travels up, where it is not tensors.
NO_TENSORS = {"local_only": "", "fedmkt": "values"}
ROUNDS = 6
#: Strategies whose clients all have slices of one parent: ten clients of one type.
ONE_PARENT = ("heterofl", "fedrolex")


@dataclass(frozen=True)
class Case:
    """How a case ended; ``gap_percent``: final loss of the eight honest clients, against the run without the two."""

    strategy: str
    fault: str
    place: str
    survived: bool
    detected: bool
    loss: float
    reference: float
    gap_percent: float
    reason: str

    def to_json(self) -> dict:
        return asdict(self)


def applies(strategy: str, fault: str) -> bool:
    """Whether the strategy's clients send what the fault changes."""
    needs = FAULTS[fault].needs
    sends = NO_TENSORS.get(strategy)
    return sends is None or needs == "" or needs == sends


def matrix() -> list[tuple[str, str, str]]:
    """All (strategy, fault, place)."""
    return [(s, f, p) for s in SHIPPED for f in FAULTS for p in PLACES if applies(s, f)]


@functools.cache
def without(strategy: str, place: str, since: int, seed: int = 0) -> Ended:
    """The run in which the two do not answer from round ``since`` on."""
    return _run(strategy, Hostile(PLACES[place], None, since), seed)


def _run(strategy: str, prepare: Hostile, seed: int) -> Ended:
    clients = (10,) if strategy in ONE_PARENT else (4, 3, 3)
    return run(toy_spec(strategy), clients, prepare=prepare, rounds=ROUNDS, seed=seed)


def play(strategy: str, fault: str, place: str, seed: int = 0) -> Case:
    """Run a case; an exception of the run is a case that was not survived."""
    kind, hostile = FAULTS[fault], PLACES[place]
    reference = without(strategy, place, kind.since, seed).loss(hostile)
    try:
        ended = _run(strategy, Hostile(hostile, kind), seed)
    except Exception as error:  # whatever it is, it is what the suite is for
        nothing = float("nan")
        line = f"{type(error).__name__}: {error}"
        return Case(strategy, fault, place, False, False, nothing, reference, nothing, line)
    refused = ended.of("refused") + ended.of("payload_refused")
    caught = {event["client_id"] for event in refused}
    loss = ended.loss(hostile)
    return Case(
        strategy, fault, place, ended.finite(), caught == set(hostile), loss, reference,
        100 * abs(loss - reference) / reference, refused[0]["reason"] if refused else "",
    )  # fmt: skip
