"""The models of an export folder beside each other on a labelled file: untouched, alone, federated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.sources import read_examples
from heterotune_flwr.export.form import data_of
from heterotune_flwr.export.opened import OpenedExport
from heterotune_flwr.schema import DataConfig
from heterotune_flwr.tuning.evaluate import evaluate
from heterotune_flwr.tuning.generation import score_generation
from heterotune_flwr.tuning.kept_model import MODELS, KeptFacts
from heterotune_flwr.tuning.states import make_rows

#: Answers written where the run wrote none.
GENERATED = 32


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
            found[name] = {
                key: float(value) for key, value in asdict(evaluate(adapter, task, rows)).items()
            }
            if task.kind == "tokens":
                asked = _answers(opened.facts.record) if generate is None else generate
                if asked:
                    settings = DataConfig(**{**asdict(data), "generate": asked})
                    report = score_generation(adapter, task, examples, settings)
                    found[name] |= {key: float(value) for key, value in asdict(report).items()}
    return found


def _answers(facts: KeptFacts) -> int:
    counts = [test.get("personal_generated") for test in facts.tests.values()]
    return int(max((count for count in counts if count), default=GENERATED))
