"""The journal's events as numbers with steps: what every tracker writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from heterotune_flwr.jsons import as_mapping, as_number, as_whole

#: Strategy and seed: a line of every chart.
Track = tuple[str, int]
#: Events with numbers, and under which name theirs stand.
_NUMBERS = {"round": "train", "evaluate": "test", "guests": "guests", "strategy_end": "end"}
#: Events that count as faults, and what each is counted as.
_FAULTS = {"client_failed": "failed", "refused": "refused", "skipped": "skipped"}
#: Fields that say which event it is.
_PLACE = ("event", "time", "strategy", "seed", "round", "of")
#: Fields whose numbers stand under a name of their own.
_OWN = {"bytes_up": "bytes/up", "bytes_down": "bytes/down"}


@dataclass(frozen=True)
class Point:
    """Numbers of one step; ``step`` is the round, ``time`` seconds since 1970."""

    step: int
    time: float
    values: dict[str, float]
    kind: str = "round"


@dataclass
class _Points:
    """What is known of one track; what a resumed run does anew does not count."""

    points: list[Point] = field(default_factory=list)
    #: Whether all this was of an earlier start, and this one has not come to it yet.
    earlier: bool = False
    #: Whether a start has begun it, and has not said yet after which round it goes on.
    begun: bool = False
    faults: dict[str, int] = field(default_factory=dict)
    last: int = 0

    def take(self, event: Mapping[str, Any]) -> None:
        kind = event["event"]
        if kind in ("start", "already_finished"):
            self.earlier = False
        if kind == "start":
            self.begun, self.faults = True, {}
            return
        if self.begun:
            self.begun = False
            self._go_on(event if kind == "resumed" else {})
        if fault := _FAULTS.get(kind):
            self.faults[fault] = self.faults.get(fault, 0) + 1
        if kind in _NUMBERS or kind == "skipped":
            self._add(kind, event)

    def _go_on(self, resumed: Mapping[str, Any]) -> None:
        """Forget what happens again after the round that a start goes on from; without one, everything."""
        done, tested = as_whole(resumed.get("round"), -1), resumed.get("evaluated") is True
        self.points = [
            point
            for point in self.points
            if point.step < done or (point.step == done and (tested or point.kind == "round"))
        ]

    def _add(self, kind: str, event: Mapping[str, Any]) -> None:
        self.last = as_whole(event.get("round"), self.last)
        values = dict(_values(_NUMBERS[kind], event)) if kind in _NUMBERS else {}
        if kind in ("round", "skipped"):
            values |= {f"faults/{name}": float(count) for name, count in self.faults.items()}
            self.faults = {}
        kind = "round" if kind == "skipped" else kind
        self.points.append(Point(self.last, as_number(event.get("time")) or 0.0, values, kind))


def _values(prefix: str, event: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of an event by name; those of types stand side by side for each measure."""
    for key, value in event.items():
        if key in _PLACE:
            continue
        if key == "types":
            for type_key, measures in as_mapping(value).items():
                for name, found in _flat(measures):
                    yield f"{prefix}_by_type/{name}/{type_key}", found
        elif key in ("cmga", "channels", "overall"):
            below = prefix if key == "overall" else key
            yield from ((f"{below}/{name}", found) for name, found in _flat(value))
        elif key in _OWN:
            yield from ((_OWN[key], found) for found in [as_number(value)] if found is not None)
        else:
            yield from ((f"{prefix}/{name}", found) for name, found in _flat({key: value}))


def _flat(tree: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in nested mappings, by the names on the way to them; lists and texts are left out."""
    for key, value in as_mapping(tree).items():
        name = f"{path}/{key}" if path else str(key)
        if isinstance(value, Mapping):
            yield from _flat(value, name)
        elif (found := as_number(value)) is not None:
            yield name, found


class PointsOf:
    """Sorts events, in order, into tracks."""

    def __init__(self) -> None:
        self._tracks: dict[Track, _Points] = {}

    def take(self, event: Mapping[str, Any]) -> None:
        """Take one event."""
        if event["event"] == "journal":
            for of in self._tracks.values():
                of.earlier = True
        strategy, seed = event.get("strategy"), event.get("seed")
        if isinstance(strategy, str) and isinstance(seed, int):
            self._tracks.setdefault((strategy, seed), _Points()).take(event)

    def settled(self, over: bool = False) -> dict[Track, list[Point]]:
        """Points that were not given before, by track: those that count whatever comes; when it is ``over``, all."""
        found = {}
        for track, of in self._tracks.items():
            if of.points and (over or not (of.begun or of.earlier)):
                found[track], of.points = of.points, []
        return found
