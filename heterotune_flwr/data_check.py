"""What a run would make of its data, in seconds: nothing is trained and no weights are loaded, tokenizers alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from heterotune_flwr.alignment.public_texts import Anchor, read_anchors, reading_places
from heterotune_flwr.backbones.sources import EMBEDDED
from heterotune_flwr.config.compose import compose
from heterotune_flwr.config.shipped import presets
from heterotune_flwr.data.columns import alike, column_called
from heterotune_flwr.data.duplicates import Seen, folded
from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.lengths import Lengths, lengths
from heterotune_flwr.data.sources import (
    columns_recognised,
    global_test,
    how_read,
    label_set,
    own_file,
    training_pool,
)
from heterotune_flwr.data.template import make_form
from heterotune_flwr.errors import ConfigError, DataError
from heterotune_flwr.names import safe_text
from heterotune_flwr.new.plan import nearest_anchors
from heterotune_flwr.new.table import look
from heterotune_flwr.own_data import (
    all_rows,
    anchors_near,
    anchors_note,
    client_shares,
    scored_labels,
    share_lines,
    text_notes,
    used_line,
)
from heterotune_flwr.schema import Config, DataConfig

#: Rendered examples, labels and natural clients that are told.
_EXAMPLES, _LABELS, _CLIENTS = 3, 20, 24
#: Clients that a bare file is dealt to at most.
_MOST = 12
_DATA = DataConfig()
#: Rows a client should have.
_FEWEST = 4


def is_data_file(name: str) -> bool:
    """Whether a name is meant as a data file's: no YAML file, and no preset."""
    path = Path(name).expanduser()
    return path.suffix not in (".yaml", ".yml") and (path.is_file() or name not in presets())


def data_config(name: str, overrides: Sequence[str]) -> Config:
    """The run that is checked: a preset's, a YAML file's, or of a bare data file one with the embedded family.

    Raises ConfigError, DataError: there is none of that name, or the file cannot be read.
    """
    path = Path(name).expanduser()
    if not is_data_file(name):
        return compose(name, overrides)
    if not path.exists():
        known = ", ".join(presets())
        raise ConfigError(f"{name!r} is no data file, no .yaml file and no preset (known: {known})")
    given = [
        f"data.train={path}",
        *(f"data.{setting}={column}" for setting, column in _columns(path).items()),
    ]
    about = [override for override in overrides if override.startswith("data.")]
    config = compose("demo", [*given, *about])
    pool = training_pool(config.data)
    named = {example.client for example in pool if example.client}
    natural = 2 <= len(named) <= _MOST and len(pool) >= _FEWEST * len(named)
    clients = len(named) if natural else min(_MOST, max(len(pool) // _FEWEST, 1))
    given.append(f"types={_types(clients)}")
    if natural:
        given.append("data.partition=natural")
    given.append(f"alignment.anchors={nearest_anchors(own_file(config.data))}")
    closed = label_set(config.data) is not None
    return compose("demo" if closed else "open_text", [*given, *overrides])


def guessed(name: str, overrides: Sequence[str]) -> list[str]:
    """A line where the answer's column was told by its values or name alone, with how to name another one."""
    said = any(override.startswith("data.label_field=") for override in overrides)
    path = Path(name).expanduser()
    column = _columns(path).get("label_field")
    if said or column is None or alike(column, _DATA.label_field):
        return []
    others = [one for one in look(path).columns if one != column]
    return [
        f"the answer's column {column!r} is a guess; another one: data.label_field=NAME here, --label NAME with "
        f"heterotune new (there are {', '.join(others)})"
    ]


def _columns(path: Path) -> dict[str, str]:
    """Settings that name a file's columns, where those by default are not there and no layout is known (DataError)."""
    table = look(path)
    if table.layout is not None:
        return {}
    found: dict[str, str] = {}
    for setting, likely in (
        ("text_field", table.text),
        ("label_field", table.label),
        ("client_field", table.client),
    ):
        default = getattr(_DATA, setting)
        column = column_called(default, table.columns) or likely(list(found.values()))
        if column is not None:
            found[setting] = column
        elif setting != "client_field":
            raise DataError(
                f"no column of {str(path)!r} can be told to be the {setting.removesuffix('_field')}: it has "
                f"{', '.join(table.columns)}; name it with data.{setting}"
            )
    return found


def _types(clients: int) -> str:
    """The embedded family as YAML, with so many clients among them."""
    counts = [len(range(place, clients, len(EMBEDDED))) for place in range(len(EMBEDDED))]
    entries = (
        f"{{backbone: {n}, clients: {c}}}" for n, c in zip(EMBEDDED, counts, strict=True) if c
    )
    return f"[{', '.join(entries)}]"


def check_data(config: Config, tokenizers: dict[str, Any]) -> dict[str, Any]:
    """Facts about a run's data, as JSON can hold them; ``tokenizers`` by backbone (:func:`..preflight.checked`)."""
    data = config.data
    pool, test = training_pool(data), global_test(data)
    scored, shares, rows = scored_labels(config), client_shares(config), all_rows(data)
    measured = {name: lengths(one, data, rows, scored) for name, one in tokenizers.items()}
    anchors = read_anchors(config.alignment)
    places, near = reading_places(anchors, config.alignment), anchors_near(data, anchors)
    return {
        "data": data.train or data.name,
        "columns": _columns_read(data, pool),
        "task": "text" if scored is None else "labels",
        "rows": {"train": len(pool), "test": len(test)},
        "used": used_line(config, shares),
        "per_client": share_lines(config, shares),
        "clients": [share.to_json() for share in shares],
        "natural_clients": dict(Counter(e.client for e in pool if e.client).most_common()),
        "answers": _answers(pool, test, closed=label_set(data) is not None),
        "lengths": {name: _lengths(found, data.max_length) for name, found in measured.items()},
        "duplicates": _duplicates(pool, test),
        "examples": _rendered(config, tokenizers, pool),
        "anchors": {
            "set": config.alignment.anchors,
            "count": len(anchors),
            "along_answers": len(places) if any(place.answer for place in places) else 0,
            "nearness": near,
            "in_data": _among(anchors, [*pool, *test]),
        },
        "notes": [
            *columns_recognised(data),
            *(
                note
                for note in text_notes(config, tokenizers, measured)
                if note.startswith("warning")
            ),
            *anchors_note(config, anchors, near),
        ],
    }


def _columns_read(data: DataConfig, pool: Sequence[Example]) -> dict[str, str]:
    """The columns that settings name, of those that were read: conversations name their own (`notes`)."""
    names = {"text": data.text_field, "label": data.label_field, "client": data.client_field}
    if data.train is not None and how_read(Path(data.train), data) is not None:
        del names["text"], names["label"]
    if not any(example.client for example in pool):
        del names["client"]
    return names


def _answers(pool: Sequence[Example], test: Sequence[Example], closed: bool) -> dict[str, Any]:
    """How many answers there are, how often the most frequent is right on the test, and of labels how many each has."""
    counts = Counter(example.label for example in pool)
    common, count = counts.most_common(1)[0]
    right = sum(common in example.answers for example in test)
    return {
        "different": len(counts),
        "labels": dict(counts.most_common()) if closed else None,
        "majority": common,
        "majority_share": count / len(pool),
        "majority_on_test": right / len(test) if test else None,
    }


def _lengths(found: Lengths, max_length: int) -> dict[str, Any]:
    totals = sorted(found.totals)
    return {
        "median": totals[len(totals) // 2],
        "fits_99_of_100": found.most,
        "longest": totals[-1],
        "max_length": max_length,
        "cut": found.cut,
        "cut_share": found.cut / len(totals),
    }


def _duplicates(pool: Sequence[Example], test: Sequence[Example]) -> dict[str, int]:
    """Rows whose text another one has; case, spaces and punctuation do not make another text of it."""
    answers: dict[str, set[str]] = defaultdict(set)
    seen = Seen()
    for example in pool:
        answers[folded(example.text)].add(example.label)
        seen.add(example.text)
    same = [seen.same(example.text) for example in test]
    near = [seen.near(example.text) for example in test]
    return {
        "within_train": len(pool) - len(answers),
        "with_different_answers": sum(len(found) > 1 for found in answers.values()),
        "test_in_train": sum(same),
        "test_near_train": sum(near) - sum(same),
    }


def _rendered(
    config: Config, tokenizers: dict[str, Any], pool: Sequence[Example]
) -> list[dict[str, str]]:
    """A few examples as the models read them; of forms that differ between backbones each."""
    chosen = [pool[len(pool) * n // _EXAMPLES] for n in range(min(_EXAMPLES, len(pool)))]
    forms: dict[tuple[str, ...], str] = {}
    for name, tokenizer in tokenizers.items():
        form = make_form(tokenizer, config.data)
        forms.setdefault(tuple(form.render(example) for example in chosen), name)
    return [
        {"backbone": name, "prompt": prompt, "answer": example.label}
        for prompts, name in forms.items()
        for prompt, example in zip(prompts, chosen, strict=True)
    ]


def _among(anchors: Sequence[Anchor], rows: Sequence[Example]) -> int:
    known = {folded(example.text) for example in rows}
    return sum(folded(anchor.text) in known for anchor in anchors)


def report_lines(found: dict[str, Any]) -> Iterator[str]:
    """The facts of :func:`check_data` for people."""
    told = {"text": "text", "label": "answer", "client": "natural clients"}
    columns = ", ".join(
        f"{told[name]} from {column!r}" for name, column in found["columns"].items()
    )
    yield (
        f"{found['data']}: {found['rows']['train']} rows to train on, {found['rows']['test']} to test"
        f"{'; ' if columns else ''}{columns}"
    )
    yield f"used: {found['used']}"
    yield "per client:"
    yield from (f"    {line}" for line in found["per_client"])
    yield from _told_natural(found["natural_clients"])
    yield from _told_answers(found["answers"])
    for name, one in _grouped(found["lengths"]):
        cut = f"{one['cut']} cut ({one['cut_share']:.1%})" if one["cut"] else "none cut"
        yield (
            f"lengths, {name}: median {one['median']} tokens, 99 of 100 rows within {one['fits_99_of_100']}, longest "
            f"{one['longest']}; data.max_length={one['max_length']}: {cut}"
        )
    yield from _told_duplicates(found["duplicates"], found["rows"])
    yield from _told_anchors(found["anchors"])
    yield from found["notes"]
    for number, one in enumerate(found["examples"], start=1):
        yield f"example {number} ({one['backbone']}):"
        text = f"{one['prompt']}▸{one['answer']}"
        yield from (f"    {line}" for line in _shortened(text).splitlines())


def _grouped(lengths: dict[str, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lengths, of backbones whose tokenizers agree once."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name, one in lengths.items():
        alike[repr(one)].append(name)
    for names in alike.values():
        yield ", ".join(names), lengths[names[0]]


def _shortened(text: str) -> str:
    """At most a dozen lines, none hidden from the eye."""
    lines = [safe_text(line, 200) for line in text.splitlines()]
    return "\n".join(lines if len(lines) <= 12 else [*lines[:8], "...", *lines[-3:]])


def _told_natural(clients: dict[str, int]) -> Iterator[str]:
    if clients:
        shown = [f"{safe_text(n, 40)} {count}" for n, count in list(clients.items())[:_CLIENTS]]
        more = f", ... {len(clients) - _CLIENTS} more" if len(clients) > _CLIENTS else ""
        yield f"natural clients: {', '.join(shown)}{more}"


def _told_answers(answers: dict[str, Any]) -> Iterator[str]:
    if answers["labels"] is None:
        yield f"answers: {answers['different']} different ones (open text)"
    else:
        shown = [f"{safe_text(n, 40)} {count}" for n, count in list(answers["labels"].items())]
        more = ", ..." if len(shown) > _LABELS else ""
        yield f"labels: {', '.join(shown[:_LABELS])}{more}"
    if answers["labels"] is not None and answers["majority_on_test"] is not None:
        yield (
            f"baseline: always {safe_text(answers['majority'], 40)!r} is right in {answers['majority_on_test']:.1%} of "
            "the test"
        )


def _told_duplicates(found: dict[str, int], rows: dict[str, int]) -> Iterator[str]:
    if not any(found.values()):
        yield "duplicates: none"
        return
    warn = "warning: " if found["test_in_train"] + found["test_near_train"] else ""
    yield (
        f"{warn}duplicates: {found['within_train']} of {rows['train']} training rows repeat a text "
        f"({found['with_different_answers']} texts with different answers); {found['test_in_train']} of {rows['test']} "
        f"test rows stand in the training data, {found['test_near_train']} more nearly"
    )


def _told_anchors(anchors: dict[str, Any]) -> Iterator[str]:
    near = anchors["nearness"]
    said = "how near cannot be told" if near is None else f"nearness {near:.2f} (1: as the data)"
    read = (
        f"; models are compared at {places} places along their answers"
        if (places := anchors["along_answers"])
        else ""
    )
    yield f"anchors: {anchors['count']} of {anchors['set']}, {said}{read}"
    if anchors["in_data"]:
        yield f"warning: {anchors['in_data']} anchors are rows of the data: anchors must be public"
