"""Reading texts with their answers: the embedded data set, Natural Instructions, or a user's file (JSON lines, CSV,
Parquet, saved ``datasets``).
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from heterotune_flwr.backbones.assets import asset_path
from heterotune_flwr.data.examples import Example, Turn
from heterotune_flwr.data.layouts import Layout, arranged, as_asked, recognised
from heterotune_flwr.data.natural_instructions import read_tasks
from heterotune_flwr.data.pools import Pool, answers_of
from heterotune_flwr.data.split import split
from heterotune_flwr.data.tables import rows
from heterotune_flwr.data.values import needed_text, plain_text
from heterotune_flwr.errors import ConfigError, DataError
from heterotune_flwr.plugins import load_plugin, plugin_names
from heterotune_flwr.schema import NATURAL_INSTRUCTIONS, DataConfig, TrainConfig
from heterotune_flwr.seeds import generator

log = logging.getLogger(__name__)

#: Data sets shipped with the package.
EMBEDDED = ("debian_sections",)
#: Told of an answer that is not among the labels.
OUTSIDE = "an answer in its data is not among the labels of the run (data.labels)"


def _column(row: Mapping[str, Any], key: str, setting: str, where: str) -> str:
    named = f"{key!r} (data.{setting}; {setting.replace('_', '-')} in a node's settings)"
    if key not in row:
        raise DataError(
            f"{where} has no column {named}; columns present: "
            f"{', '.join(sorted(str(name) for name in row if name))}"
        )
    return needed_text(row[key], where, named)


def _references(value: Any, where: str, column: str) -> tuple[str, ...]:
    """Further right answers of a row: a list of texts, or one text."""
    items = value if isinstance(value, list) else [value]
    if not isinstance(value, list) and plain_text(value, where, column) is None:
        return ()
    return tuple(needed_text([item], where, column) for item in items)


def read_examples(path: Path, data: DataConfig) -> list[Example]:
    """Read a file's examples in their order.

    The natural client is read only where the column exists; ``partition: natural`` insists on it. Conversations and
    instructions are recognised by their columns (:mod:`.layouts`), and a log line says so.

    Raises DataError: no such file, unreadable, a column is missing, a value is no text, or there is not one example.
    """
    examples: list[Example] = []
    layout: Layout | None = None
    client = repr(data.client_field)
    references = f"{data.references_field!r} (data.references_field)"
    for number, where, found in rows(path, data.format):
        values = as_asked(found, data)
        if not examples and (layout := recognised(values, data)):
            log.info("%s is %s", path, layout.described())
        row, turns = arranged(values, layout, data, where)
        examples.append(
            Example(
                text=_column(row, data.text_field, "text_field", where),
                label=_column(row, data.label_field, "label_field", where),
                client=plain_text(row.get(data.client_field), where, client) or "",
                references=_references(row.get(data.references_field), where, references),
                turns=turns,
                row=number,
            )
        )
    if not examples:
        raise DataError(f"data file {str(path)!r} holds no example")
    return examples


def how_read(path: Path, data: DataConfig) -> str | None:
    """How a file's rows are read where its columns, not the settings, say so; DataError as :func:`read_examples`."""
    for _, _, values in rows(path, data.format):
        layout = recognised(as_asked(values, data), data)
        return None if layout is None else layout.described()
    return None


def _path(data: DataConfig, part: str) -> Path:
    given = data.train if part == "train" else data.test
    if given is not None:
        return Path(given).expanduser()
    if data.name == NATURAL_INSTRUCTIONS:
        raise DataError(
            f"data.{part} is not set; give data.train=DIRECTORY with Natural Instructions task files "
            "(https://github.com/allenai/natural-instructions, folder tasks), or the id of a hub data set"
        )
    if data.name not in EMBEDDED:
        raise DataError(
            f"data.{part} is not set and {data.name!r} is no embedded data set "
            f"({', '.join((*EMBEDDED, *plugin_names('data')))}); give data.train and data.test",
            f"there is no {part} data for this run on it (test in a node's settings)",
        )
    found = asset_path(f"{data.name}/{part}.jsonl.gz")
    if found is None:
        raise DataError(
            f"the embedded data set {data.name!r} is not installed here; install heterotune-flwr "
            "into this environment or set HETEROTUNE_ASSETS"
        )
    return found


#: Settings on which the reading of a file depends.
_COLUMNS = ("text_field", "label_field", "client_field", "references_field", "format")


def _table(data: DataConfig, part: str) -> tuple[Example, ...]:
    """Examples of a file, read once as long as it does not change."""
    path = _path(data, part)
    stamp = path.stat().st_mtime_ns if path.exists() else 0
    return _read(path, stamp, tuple(getattr(data, name) for name in _COLUMNS))


@functools.lru_cache(maxsize=16)
def _read(path: Path, stamp: int, columns: tuple[Any, ...]) -> tuple[Example, ...]:
    data = DataConfig(**dict(zip(_COLUMNS, columns, strict=True)))
    return tuple(read_examples(path, data))


@functools.cache
def plugin_examples(name: str, part: str) -> tuple[Example, ...]:
    """Examples of a data set that an installed package brings: its entry point is a function of the part."""
    try:
        examples = tuple(load_plugin("data", name)(part))
    except Exception as error:  # another package's code
        raise DataError(f"data set {name!r} of an installed package, {part}: {error}") from error
    if not examples or not all(isinstance(example, Example) for example in examples):
        raise DataError(f"data set {name!r} of an installed package gives no Examples for {part}")
    for number, example in enumerate(examples, start=1):
        _check_texts(
            example, f"data set {name!r} of an installed package, {part}, example {number}"
        )
    return examples


def _check_texts(example: Example, where: str) -> None:
    """Refuse an example of another's code that holds something else than texts (DataError)."""
    if not isinstance(example.references, tuple):
        raise DataError(
            f"{where}: references is a {type(example.references).__name__}, not a tuple of texts"
        )
    if not all(isinstance(turn, Turn) for turn in example.turns):
        raise DataError(f"{where}: turns holds something else than Turns")
    needed = {"text": (example.text,), "label": (example.label,), "references": example.references}
    for name, values in {**needed, "client": (example.client or "-",)}.items():
        for value in values:
            if not isinstance(value, str):
                raise DataError(f"{where}: {name} is a {type(value).__name__}, not a text")
            needed_text(value, where, name)


def is_shipped(name: str) -> bool:
    """Whether a data set comes with this package or with an installed one."""
    return name in EMBEDDED or name in plugin_names("data")


def _is_plugin(data: DataConfig) -> bool:
    return data.train is None and data.test is None and data.name in plugin_names("data")


def columns_recognised(data: DataConfig) -> list[str]:
    """A line for each of a run's own files whose columns say how they are read (:func:`how_read`)."""
    given = [data.train, data.test] if data.name != NATURAL_INSTRUCTIONS else []
    paths = [Path(path).expanduser() for path in given if path is not None]
    return [f"{path} is {how}" for path in dict.fromkeys(paths) if (how := how_read(path, data))]


def splits(data: DataConfig) -> bool:
    """Whether the test is a part of the run's own training file (:mod:`.split`)."""
    return data.train is not None and data.test is None and data.name != NATURAL_INSTRUCTIONS


def training_pool(data: DataConfig) -> tuple[Example, ...]:
    """All examples that a simulation's clients can draw from, in file order."""
    pool = own_file(data)
    return split(Pool(pool), data.test_share)[0] if splits(data) else pool


def own_file(data: DataConfig) -> tuple[Example, ...]:
    """All examples of the training data: of a deployed client its own, of a simulation those for the test too."""
    if data.name == NATURAL_INSTRUCTIONS and data.train is not None:
        return read_tasks(data.train, data, None if data.test is not None else "train")
    if _is_plugin(data):
        return plugin_examples(data.name, "train")
    return _table(data, "train")


def global_test(data: DataConfig) -> list[Example]:
    """The test set everybody is measured on: ``global_test_examples`` of the test file at most.

    They are the file's first; of a file of one's own, which may be sorted, a random choice that is always the same.

    Raises DataError: as :func:`read_examples`; also when an answer is outside the closed label set.
    """
    if _is_plugin(data):
        where, found = f"test of {data.name}", plugin_examples(data.name, "test")
    elif data.name == NATURAL_INSTRUCTIONS and (data.test or data.train) is not None:
        where = str(data.test or data.train)
        found = read_tasks(where, data, None if data.test is not None else "test")
    elif splits(data):
        where, found = str(data.train), split(Pool(own_file(data)), data.test_share)[1]
    else:
        where, found = str(_path(data, "test")), _table(data, "test")
    used = min(data.global_test_examples, data.generate or data.global_test_examples)
    if (data.test is not None or splits(data)) and used < len(found):
        order = generator(0, "data.test").permutation(len(found))
        found = tuple(found[index] for index in order.tolist())
    examples = list(found[: data.global_test_examples])
    check_labels(examples, label_set(data), where)
    return examples


def label_set(data: DataConfig) -> list[str] | None:
    """The closed set of answers in its one order, or None for an open-text task."""
    if data.labels is not None:
        if len(set(data.labels)) != len(data.labels) or len(data.labels) < 2:
            raise DataError("data.labels must name at least two answers, each once")
        return list(data.labels)
    if data.max_labels < 1:
        return None
    found = list(answers_of(own_file(data)))
    if len(found) < 2:
        raise DataError(f"every example has the answer {found[0]!r}: there is nothing to learn")
    return found if len(found) <= data.max_labels else None


def loss_kind(config: TrainConfig, labels: Sequence[str] | None) -> str:
    """Resolve ``train.loss``: ``auto`` is ``labels`` for a closed label set.

    Raises ConfigError: ``labels`` asked of an open-text task.
    """
    if config.loss == "labels" and labels is None:
        raise ConfigError.plain(
            "train.loss is 'labels' but the task has no closed label set; set data.labels"
        )
    if config.loss == "auto":
        return "labels" if labels is not None else "tokens"
    return config.loss


def check_labels(examples: Iterable[Example], labels: Sequence[str] | None, where: str) -> None:
    """Raise DataError for an answer outside a closed label set."""
    if labels is None:
        return
    known = set(labels)
    for number, example in enumerate(examples, start=1):
        if example.label not in known:  # the answer itself may be private
            place = f"row {example.row}" if example.row else f"example {number}"
            raise DataError(
                f"{where}: the answer of {place} is not in the label set "
                f"({', '.join(labels[:8])}{', ...' if len(labels) > 8 else ''}); set data.labels",
                OUTSIDE,
            )


def examples_digest(examples: Iterable[Example]) -> str:
    """SHA-256 (hex) over texts and right answers in order: what results and states depend on."""
    digest = hashlib.sha256()
    for example in examples:
        turns = [[[turn.role, turn.content] for turn in example.turns]] if example.turns else []
        digest.update(json.dumps([example.text, *example.answers, *turns]).encode())
    return digest.hexdigest()


def public_labels(data: DataConfig) -> list[str] | None:
    """Labels the run names, or those of a shipped data set; never those of the client's own file."""
    if data.labels is None and data.train is None and data.name in EMBEDDED:
        return label_set(data)
    return data.labels
