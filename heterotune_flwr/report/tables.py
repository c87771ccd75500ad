"""A run's facts as flat tables, one CSV file each."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from heterotune_flwr.config.plain import flatten
from heterotune_flwr.errors import FederationError
from heterotune_flwr.exchange.storage import atomic_write_text
from heterotune_flwr.report.facts import RunFacts
from heterotune_flwr.report.measured import BARE
from heterotune_flwr.report.picks import MODEL_NAMES

Row = Mapping[str, Any]
_BARE = re.compile(rf"(?<![a-z]){BARE}(?![a-z])")
#: Columns whose values are models.
_MODELS = ("kind", "took", "model")
#: Parts of RunFacts that are a table as they are.
_PLAIN = (
    "runs", "types", "clients", "side_by_side", "type_outcomes", "client_outcomes", "answers",
    "alignment", "channels", "traffic", "phases", "happenings", "settings", "protections",
)  # fmt: skip


def tables(facts: RunFacts) -> dict[str, list[Row]]:
    """Name -> rows; nested values have dotted columns, lists a row per entry or words with ``;`` between."""
    found = {name: [_flat(row) for row in getattr(facts, name)] for name in _PLAIN}
    found["curves"] = list(_curves(facts))
    found["agreement"] = list(_agreement(facts))
    found["confusions"] = list(_confusions(facts))
    return found


def write_csv(facts: RunFacts, directory: Path) -> list[Path]:
    """Write every table that has rows (FederationError: the folder cannot be written)."""
    written = []
    for name, rows in tables(facts).items():
        if not rows:
            continue
        columns = dict.fromkeys(_named(column) for row in rows for column in row)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {_named(key): _cell(_worded(key, value)) for key, value in row.items()} for row in rows
        )
        path = directory / f"{name}.csv"
        try:
            atomic_write_text(path, text.getvalue())
        except OSError as error:
            raise FederationError(f"{path} cannot be written: {error.strerror or error}") from error
        written.append(path)
    return written


def _named(key: str) -> str:
    """A column's name in the page's words: what ``bare`` is called in the JSON is the untouched model."""
    return _BARE.sub(MODEL_NAMES[BARE], key)


def _worded(key: str, value: Any) -> Any:
    return MODEL_NAMES[BARE] if key in _MODELS and value == BARE else value


def _cell(value: Any) -> Any:
    """A text that a spreadsheet would take for a formula begins with a quotation mark."""
    return f"'{value}" if isinstance(value, str) and value[:1] in "=+-@\t\r" and value else value


def _flat(row: Any) -> Row:
    return {key: _plain(value) for key, value in flatten(asdict(row))}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return "; ".join(map(str, value))
    return None if value == {} else value


def _curves(facts: RunFacts) -> Iterator[Row]:
    for curve in facts.curves:
        for number, value, moved in zip(curve.rounds, curve.values, curve.bytes, strict=True):
            yield {
                "strategy": curve.strategy, "seed": curve.seed, "measure": curve.measure,
                "type_key": curve.type_key, "round": number, "value": value, "bytes": moved,
            }  # fmt: skip


def _agreement(facts: RunFacts) -> Iterator[Row]:
    for one in facts.agreement:
        tables: dict[str, Mapping[str, Sequence[float | None]]] = {
            "cosine": one.cosines,
            "with_step": one.with_step,
            "norm": one.norms,
            "weight": one.weights,
            "conflict_rate": {"": one.conflict_rate},
        }
        for measure, columns in tables.items():
            for key, values in columns.items():
                for number, value in zip(one.rounds, values, strict=False):
                    if value is not None:
                        yield {
                            "strategy": one.strategy, "seed": one.seed, "slot": one.slot,
                            "measure": measure, "of": key, "round": number, "value": value,
                        }  # fmt: skip


def _confusions(facts: RunFacts) -> Iterator[Row]:
    for one in facts.confusions:
        for right, counts in zip(one.labels, one.counts, strict=True):
            for answered, count in zip(one.labels, counts, strict=True):
                if count:
                    yield {
                        "strategy": one.strategy, "seed": one.seed, "model": one.model,
                        "scope": one.scope, "type_key": one.type_key, "right": right,
                        "answered": answered, "count": count,
                    }  # fmt: skip
