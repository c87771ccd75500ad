"""Natural Instructions: tasks, each with a definition in words and instances (arXiv 2104.08773, 2204.07705).

A directory holds one JSON file per task, as published (https://github.com/allenai/natural-instructions, folder
``tasks``): ``Definition`` (text or list of texts), ``Positive Examples`` and ``Instances`` with ``input`` and
``output`` (text or list of texts, all of them right). The same from the hub is a table with one row per instance:
``task_name``, ``definition``, ``inputs`` and ``targets``, as in ``Muennighoff/natural-instructions``.

A task's name is its examples' natural client. Which instances are kept for the global test is a function of the task
and the input alone: the same on every machine and for every seed, and equal inputs never lie on both sides.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.values import needed_text, plain_text
from heterotune_flwr.errors import DataError, one_line
from heterotune_flwr.schema import DataConfig

#: Value of ``data.name``.
_HUB_COLUMNS = ("task_name", "definition", "inputs", "targets")
#: Bytes of a hash that decide the side of an instance.
_HASH_BYTES = 8


def read_tasks(source: str, data: DataConfig, part: str | None = None) -> tuple[Example, ...]:
    """Examples of a directory of task files, or of a hub data set in that form.

    Raises DataError: nothing there, a file that is no task, no task of the names asked for, or an empty part.

    Parameters
    ----------
    source
        A directory, or a hub id (a directory of .jsonl or .parquet files with the hub's columns is read alike).
    data
        ``tasks``, ``instances_per_task``, ``demonstrations`` and ``test_share`` are used.
    part
        ``train`` (task by task), ``test`` (the tasks in turn, so that every beginning is balanced), or None: all.

    """
    names = None if data.tasks is None else tuple(data.tasks)
    shape = (names, data.instances_per_task, data.demonstrations)
    return _part(source, _stamp(source), shape, part, data.test_share)


#: Names or patterns of tasks, instances per task, demonstrations.
_Shape = tuple[tuple[str, ...] | None, int, int]


@functools.lru_cache(maxsize=8)
def _part(
    source: str, stamp: tuple[tuple[str, int], ...], shape: _Shape, part: str | None, share: float
) -> tuple[Example, ...]:
    tasks = _load(source, stamp, shape)
    chosen = [[e for e in task if part in (None, side(e, share))] for task in tasks]
    if part == "train":
        examples = tuple(itertools.chain.from_iterable(chosen))
    else:
        turns = itertools.zip_longest(*chosen)
        examples = tuple(e for turn in turns for e in turn if e is not None)
    if not examples:
        raise DataError(
            f"{source} has no instance for the {part or 'whole'} part; change data.test_share or raise "
            "data.instances_per_task"
        )
    return examples


def side(example: Example, test_share: float) -> str:
    """``test`` or ``train``: decided by a hash of task and text."""
    digest = hashlib.sha256(f"{example.client}\0{example.text}".encode()).digest()
    drawn = int.from_bytes(digest[:_HASH_BYTES], "big") / 2 ** (8 * _HASH_BYTES)
    return "test" if drawn < test_share else "train"


def _stamp(source: str) -> tuple[tuple[str, int], ...]:
    """Names and times of the files of a directory: what a kept reading depends on."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return ()
    return tuple(sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir()))


@functools.lru_cache(maxsize=8)
def _load(
    source: str, stamp: tuple[tuple[str, int], ...], shape: _Shape
) -> tuple[tuple[Example, ...], ...]:
    """Examples task by task; what the stamp is for: a changed file is read again."""
    names, limit, demonstrations = shape
    folder = Path(source).expanduser()
    if folder.is_file():
        raise DataError(f"{source} is a file; natural_instructions wants a directory of task files")
    files = [folder / name for name, _ in stamp if name.endswith(".json")]
    if files:
        chosen = [path for path in files if _wanted(path.stem, names)]
        tasks = [tuple(_task(path, limit, demonstrations)) for path in chosen]
    elif demonstrations:
        raise DataError(
            f"{source} is no directory of task .json files, and only those have demonstrations; set "
            "data.demonstrations=0"
        )
    else:
        tasks = _hub_tasks(source, names, limit)
    if not tasks:
        raise DataError(f"{source} has none of the tasks {', '.join(names or ())} (data.tasks)")
    return tuple(tasks)


def _wanted(task: str, names: Sequence[str] | None) -> bool:
    return names is None or any(fnmatch.fnmatchcase(task, name) for name in names)


def _texts(value: Any, where: str) -> list[str]:
    """A text, or a list of texts, as a list without the blank ones."""
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in items):
        raise DataError(f"{where} is neither a text nor a list of texts")
    texts = [plain_text(item, where, "it") for item in items]
    return [text.strip() for text in texts if text is not None]


def _one(value: Any, where: str) -> str:
    """The one text of a value, empty where there is none."""
    texts = _texts(value, where)
    if len(texts) > 1:
        raise DataError(f"{where} has {len(texts)} texts, where one is needed")
    return texts[0] if texts else ""


def _field(entry: Any, name: str, where: str) -> Any:
    if not isinstance(entry, dict):
        raise DataError(f"{where} is not a JSON object")
    if name not in entry:
        present = ", ".join(sorted(map(str, entry))[:8])
        raise DataError(f"{where} has no field {name!r}; fields present: {present}")
    return entry[name]


def _task(path: Path, limit: int, demonstrations: int) -> Iterator[Example]:
    """Examples of one task file; instances without an answer are left out."""
    try:
        task = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"task file {path} cannot be read as JSON: {error}") from error
    where = f"task file {path}"
    definition = " ".join(_texts(_field(task, "Definition", where), f"{where}: Definition"))
    head = [definition, *_shown(task, demonstrations, where)]
    instances = _field(task, "Instances", where)
    if not isinstance(instances, list) or not instances:
        raise DataError(f"{where} has no instances")
    found = 0
    for number, entry in enumerate(instances[:limit], start=1):
        here = f"{where}, instance {number}"
        answers = _texts(_field(entry, "output", here), f"{here}: output")
        given = _one(_field(entry, "input", here), f"{here}: input")
        if answers and given:
            found += 1
            yield dataclasses.replace(_example(head, given, answers, path.stem), row=number)
    if not found:
        raise DataError(
            f"{where}: not one of its first {limit} instances has an input and an output"
        )


def _shown(task: Any, count: int, where: str) -> list[str]:
    """The first ``count`` positive examples as they stand in a prompt."""
    if not count:
        return []
    positive = _field(task, "Positive Examples", where)
    if not isinstance(positive, list) or len(positive) < count:
        raise DataError(f"{where} has fewer positive examples than data.demonstrations={count}")
    shown = []
    for number, entry in enumerate(positive[:count], start=1):
        here = f"{where}, positive example {number}"
        given = _texts(_field(entry, "input", here), f"{here}: input")
        answer = _texts(_field(entry, "output", here), f"{here}: output")
        shown.append(f"Input: {' '.join(given)}\nOutput: {' '.join(answer)}")
    return shown


def _example(head: Iterable[str], given: str, answers: Sequence[str], task: str) -> Example:
    """Definition (and demonstrations), then the input: what fills ``{text}`` of the prompt."""
    text = "\n\n".join([*head, f"Input: {given}"])
    others = tuple(a for a in dict.fromkeys(answers) if a != answers[0])
    return Example(text, answers[0], task, others)


def _hub_tasks(source: str, names: Sequence[str] | None, limit: int) -> list[tuple[Example, ...]]:
    """Tasks of a hub data set (or of a directory of its files), by name."""
    from datasets import load_dataset

    try:
        table = load_dataset(source, split="train")
        missing = [column for column in _HUB_COLUMNS if column not in table.column_names]
        if not missing and names is not None:
            table = table.filter(lambda task: _wanted(str(task), names), input_columns="task_name")
    except Exception as error:  # whatever net, hub and formats can give
        reason = one_line(error)
        raise DataError(
            f"{source!r} is no directory of task .json files, and loading it as a hub data set failed: {reason}"
        ) from error
    if missing:
        raise DataError(
            f"{source} has no column {missing[0]!r}; columns present: {', '.join(table.column_names)}"
        )
    rows: dict[str, dict[str, list[str]]] = {}
    definitions: dict[str, str] = {}
    for number, row in enumerate(table, start=1):
        # One row per right answer: rows of equal input are one instance.
        where = f"{source}, row {number}"
        task = needed_text(row["task_name"], where, "'task_name'")
        instances = rows.setdefault(task, {})
        answers = _texts(row["targets"], f"{where}: targets")
        given = _one(row["inputs"], f"{where}: inputs")
        if answers and given and (given in instances or len(instances) < limit):
            instances.setdefault(given, []).extend(answers)
            definitions[task] = " ".join(_texts(row["definition"], f"{where}: definition"))
    return [
        tuple(_example([definitions[task]], given, rows[task][given], task) for given in rows[task])
        for task in sorted(definitions)
    ]
