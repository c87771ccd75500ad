"""What rounds tell: curves over rounds and bytes, alignment, agreement between types, channels."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from heterotune_flwr.jsons import (
    as_list,
    as_mapping,
    as_number,
    as_numbers,
    as_whole,
    whole_or_none,
)
from heterotune_flwr.protocol.metrics import MEASURED, TESTS
from heterotune_flwr.report.facts import Agreement, Alignment, ChannelFacts, StrategyRun
from heterotune_flwr.report.files import RunFiles
from heterotune_flwr.report.measured import ALL_TYPES, Curve

Entry = Mapping[str, Any]


def entries(files: RunFiles, run: StrategyRun, kind: str) -> list[Entry]:
    """``round`` or ``evaluate`` entries of a strategy and seed, one per round, in order."""
    found = files.of(kind, key=run.key)
    if not found and run.key in files.results:
        told = map(as_mapping, as_list(files.results[run.key].get("rounds")))
        found = [e for e in told if e.get("event") == kind]
    by_round = {as_whole(entry.get("round")): entry for entry in found}
    return [by_round[number] for number in sorted(by_round)]


def curves(files: RunFiles, runs: Sequence[StrategyRun]) -> list[Curve]:
    """Training and tests, over all types and by type."""
    found: dict[tuple[str, int, str, str], Curve] = {}
    for run in runs:
        moved: dict[int, int | None] = {0: 0}
        for entry in entries(files, run, "round"):
            number = as_whole(entry.get("round"))
            up, down = whole_or_none(entry.get("bytes_up")), whole_or_none(entry.get("bytes_down"))
            moved[number] = None if up is None or down is None else up + down
            for type_key, part in _parts(entry, entry):
                for name in ("loss", "accuracy"):
                    _add(
                        found, run, f"train_{name}", type_key, number, part.get(name), moved[number]
                    )
        trained = sorted(moved)
        for entry in entries(files, run, "evaluate"):
            number = as_whole(entry.get("round"))
            before = trained[bisect_right(trained, number) - 1]
            for type_key, part in _parts(entry, as_mapping(entry.get("overall"))):
                for scope in TESTS:
                    for name in MEASURED:
                        value = part.get(f"{scope}_{name}_mean")
                        _add(found, run, f"{scope}_{name}", type_key, number, value, moved[before])
    return list(found.values())


def _parts(entry: Entry, overall: Entry) -> Iterator[tuple[str, Entry]]:
    yield ALL_TYPES, overall
    for type_key, part in as_mapping(entry.get("types")).items():
        yield type_key, as_mapping(part)


def _add(
    found: dict[tuple[str, int, str, str], Curve],
    run: StrategyRun,
    measure: str,
    type_key: str,
    number: int,
    value: Any,
    moved: int | None,
) -> None:
    if (point := as_number(value)) is None:
        return
    place = (run.strategy, run.seed, measure, type_key)
    curve = found.setdefault(place, Curve(*place))
    curve.rounds.append(number)
    curve.values.append(point)
    curve.bytes.append(moved)


def alignment(files: RunFiles) -> list[Alignment]:
    """How well every slot, and every further view, of each type is aligned; the last word for each counts."""
    threshold = as_number(files.section("alignment").get("quality_threshold"))
    control = files.section("alignment").get("control", "none") != "none"
    slots = as_whole(files.section("method").get("slots"), 1)
    found: dict[tuple[int, str, str], Alignment] = {}
    events = files.of("align") or [
        {"seed": seed, "quality": as_mapping(entry.get("alignment")).get("quality")}
        for (_, seed), entry in files.results.items()
    ]
    for event in events:
        seed, cached = as_whole(event.get("seed")), event.get("cached")
        for type_key, values in as_mapping(event.get("quality")).items():
            for place, value in enumerate(as_list(values)):
                if (quality := as_number(value)) is None:
                    continue
                name = f"slot {place}" if place < slots else _view(files, place - slots)
                shared = None if threshold is None else control or quality >= threshold
                found[seed, type_key, name] = Alignment(
                    seed, type_key, name, quality, threshold, shared,
                    cached if isinstance(cached, bool) else None,
                )  # fmt: skip
    return list(found.values())


def _view(files: RunFiles, number: int) -> str:
    methods = [files.section("method")]
    methods += [
        as_mapping(as_mapping(s).get("method")) for s in files.section("strategies").values()
    ]
    views = max((as_list(method.get("views")) for method in methods), key=len)
    return f"view {views[number] if number < len(views) else number}"


def agreement(files: RunFiles, runs: Sequence[StrategyRun]) -> list[Agreement]:
    """What CMGA saw of types' updates, slot by slot over rounds."""
    found: dict[tuple[str, int, str], Agreement] = {}
    for run in runs:
        for entry in entries(files, run, "round"):
            for slot, facts in as_mapping(entry.get("cmga")).items():
                place = (run.strategy, run.seed, str(slot))
                one = found.setdefault(place, Agreement(*place))
                one.rounds.append(as_whole(entry.get("round")))
                _take(one, as_mapping(facts))
    return list(found.values())


def _take(one: Agreement, facts: Entry) -> None:
    count = len(one.rounds)
    for name, table in (
        ("cosine_before", one.cosines),
        ("agreement", one.with_step),
        ("norms", one.norms),
        ("weights", one.weights),
    ):
        told = as_mapping(facts.get(name))
        for key in {**table, **told}:
            column = table.setdefault(key, [])
            column += [None] * (count - 1 - len(column))
            column.append(as_number(told.get(key)))
    one.conflict_rate.append(as_number(facts.get("conflict_rate")))


def channels(files: RunFiles, runs: Sequence[StrategyRun]) -> list[ChannelFacts]:
    """What every channel said in the last round that tells of it, why it is off, and its notes."""
    found: dict[tuple[str, int, str], ChannelFacts] = {}

    def of(run: StrategyRun, channel: Any) -> ChannelFacts:
        place = (run.strategy, run.seed, str(channel))
        return found.setdefault(place, ChannelFacts(*place))

    for run in runs:
        for entry in entries(files, run, "round"):
            for name, told in as_mapping(entry.get("channels")).items():
                facts = as_mapping(told)
                one = of(run, name)
                one.numbers |= as_numbers(facts)
                one.by_type |= {k: told for k, v in facts.items() if (told := as_numbers(v))}
        for event in files.of("channel_off", "channel_note", key=run.key):
            one = of(run, event.get("channel"))
            if event["event"] == "channel_off":
                one.off = str(event.get("reason") or "")
            elif str(event.get("text")) not in one.notes:
                one.notes.append(str(event.get("text")))
    return list(found.values())
