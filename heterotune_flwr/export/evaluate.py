"""The models of an export folder beside each other on a labelled file: untouched, alone, federated."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.sources import read_examples
from heterotune_flwr.export.facts import LONG_TITLES, ExportFacts
from heterotune_flwr.export.form import data_of
from heterotune_flwr.export.opened import OpenedExport, open_export
from heterotune_flwr.schema import DataConfig
from heterotune_flwr.tuning.evaluate import evaluate
from heterotune_flwr.tuning.generation import score_generation
from heterotune_flwr.tuning.kept_model import MODELS, KeptFacts
from heterotune_flwr.tuning.states import make_rows

_COLUMNS = {
    "examples": "examples",
    "accuracy": "accuracy",
    "loss": "loss",
    "generated": "answers",
    "exact_match": "exact match",
    "rouge_l": "ROUGE-L",
}
_SHARES = ("accuracy", "exact_match", "rouge_l")
#: Answers written where the run wrote none.
GENERATED = 32


@dataclass(frozen=True)
class Evaluation:
    """What a folder's models came to on a file; ``holds`` is what the folder itself is."""

    folder: Path
    data: Path
    holds: str
    models: Mapping[str, Mapping[str, float]]


def evaluate_file(
    folder: Path,
    path: Path,
    columns: Mapping[str, str],
    *,
    prior: bool = True,
    generate: int | None = None,
) -> Evaluation:
    """Load an export folder and measure its models on a file; the file is read before the models are.

    Parameters as :func:`measure`, ``columns`` as :func:`read_rows`; errors of both and of :func:`.opened.open_export`.
    """
    facts = ExportFacts.load(folder)
    data, examples = read_rows(path, facts.record, **columns)
    found = measure(open_export(folder), examples, data, prior=prior, generate=generate)
    return Evaluation(folder, path, facts.model, found)


def to_json(found: Evaluation) -> str:
    """One JSON object."""
    plain = {"folder": str(found.folder), "data": str(found.data), "holds": found.holds}
    return json.dumps({**plain, "models": found.models}, indent=1)


def render(found: Evaluation) -> str:
    """A table for people, a row a model."""
    columns = [name for name in _COLUMNS if any(name in row for row in found.models.values())]
    lines = ["".join(["model".ljust(15), *(_COLUMNS[name].rjust(13) for name in columns)])]
    for model, row in found.models.items():
        cells = [
            _cell(name, row[name]).rjust(13) if name in row else "-".rjust(13) for name in columns
        ]
        mark = " *" if model == found.holds else ""
        lines.append("".join([LONG_TITLES[model].ljust(15), *cells, mark]))
    return "\n".join([*lines, f"* what {found.folder} itself is"])


def _cell(name: str, value: float) -> str:
    if name in _SHARES:
        return f"{100 * value:.1f} %"
    return f"{value:.4f}" if name == "loss" else f"{value:.0f}"


def read_rows(path: Path, facts: KeptFacts, **columns: str) -> tuple[DataConfig, list[Example]]:
    """A labelled file as the data of an exported model, and its examples (DataError: it cannot be read).

    ``columns``: ``text_field`` and ``label_field``, where they have other names.
    """
    data = data_of(facts, **columns)
    return data, read_examples(path, data)


def measure(
    opened: OpenedExport,
    examples: Sequence[Example],
    data: DataConfig,
    *,
    prior: bool = True,
    generate: int | None = None,
) -> dict[str, dict[str, float]]:
    """Metrics of every model: ``loss``, ``accuracy``, ``examples``; for open text those of written answers too.

    Parameters
    ----------
    opened, examples, data
        The loaded folder, and rows with the settings they were read by.
    prior
        Whether the owner's label frequencies count: the rows are like its own data.
    generate
        Answers to write; None: as many as the run did, or :data:`GENERATED`.

    Raises
    ------
    DataError
        A label is not of the model's label set.

    """
    task = opened.task
    encoded = task.encode(examples)
    found: dict[str, dict[str, float]] = {}
    for name in sorted(opened.names, key=MODELS.index):
        offsets = opened.offsets(name, encoded, prior)
        with opened.using(name) as adapter:
            rows = make_rows(adapter, encoded, on_disk=False, offsets=offsets)
            found[name] = evaluate(adapter, task, rows).metrics
            if task.kind == "tokens":
                asked = _answers(opened.facts.record) if generate is None else generate
                if asked:
                    report = score_generation(
                        adapter, task, examples, replace(data, generate=asked)
                    )
                    found[name] |= report.metrics
    return found


def _answers(facts: KeptFacts) -> int:
    counts = [test.get("personal_generated") for test in facts.tests.values()]
    return int(max((count for count in counts if count), default=GENERATED))
