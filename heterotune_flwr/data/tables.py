"""Which form a data file has, and its rows: texts by :mod:`.text_files`, Parquet and saved ``datasets`` here."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heterotune_flwr.data.text_files import Row, csv_rows, json_rows
from heterotune_flwr.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

FORMS = ("jsonl", "csv", "parquet", "dataset")
#: Ends of names (before .gz) -> form.
_SUFFIXES = {
    "jsonl": "jsonl", "json": "jsonl", "ndjson": "jsonl", "csv": "csv", "tsv": "csv", "parquet": "parquet",
}  # fmt: skip
_BATCH = 1024


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk``."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def form_of(path: Path, form: str | None = None) -> str:
    """One of :data:`FORMS`: as told, else by the name (DataError: neither tells)."""
    if form is not None:
        if form not in FORMS:
            raise DataError(f"data.format is {form!r}; choose one of {', '.join(FORMS)}")
        return form
    if is_saved_dataset(path):
        return "dataset"
    found = _SUFFIXES.get(Path(path.name.removesuffix(".gz")).suffix.removeprefix(".").lower())
    if found is None:
        raise DataError(
            f"data file {str(path)!r} is neither .jsonl, .json, .csv, .tsv (or .gz of these), .parquet nor a saved "
            "dataset; say which it is with data.format (format in a node's settings)"
        )
    return found


def rows(path: Path, form: str | None = None) -> Iterator[Row]:
    """Rows of a data file in their order: number (line or place), where it stands (for errors), values by column.

    Raises DataError: there is no such file, it is damaged, or a row of it cannot be read; the line names it.
    """
    if not path.is_file() and not is_saved_dataset(path):
        reason = "is no file" if path.exists() else "does not exist"
        raise DataError(f"data file {str(path)!r} {reason}")
    form = form_of(path, form)
    if form in ("jsonl", "csv"):
        yield from json_rows(path) if form == "jsonl" else csv_rows(path)
    else:
        yield from _binary_rows(path, form)


def _binary_rows(path: Path, form: str) -> Iterator[Row]:
    """Rows of a Parquet file or of a saved dataset, numbered from 1."""
    try:
        batches = _parquet(path) if form == "parquet" else _saved(path)
        for number, row in enumerate(itertools.chain.from_iterable(batches), start=1):
            yield number, f"{path}, row {number}", row
    except RecursionError as error:
        raise DataError(f"data file {str(path)!r} has a column that is nested too deep") from error
    except DataError:
        raise
    except Exception as error:  # a damaged file is read far before it is noticed
        # Only the kind of the error: its text may quote private data, and this line may travel.
        raise DataError(
            f"data file {str(path)!r} cannot be read as {form} ({type(error).__name__}); save it again, or set "
            "data.format (format in a node's settings)"
        ) from error


def _parquet(path: Path) -> Iterator[list[dict[str, Any]]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as table:
        names = _class_names(table.schema_arrow)
        for batch in table.iter_batches(batch_size=_BATCH):
            yield _named(batch.to_pylist(), names)


def _saved(path: Path) -> Iterator[list[dict[str, Any]]]:
    from datasets import DatasetDict, load_from_disk

    found = load_from_disk(str(path))
    if isinstance(found, DatasetDict):
        splits = sorted(found)
        if "train" not in splits and len(splits) != 1:
            raise DataError(
                f"data {str(path)!r} has the splits {', '.join(splits)} and no 'train'; give the folder of one of them"
            )
        found = found["train" if "train" in splits else splits[0]]
    names = _class_names(found.features.arrow_schema)
    for batch in found.with_format("arrow").iter(batch_size=_BATCH):
        yield _named(batch.to_pylist(), names)


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Columns whose numbers stand for names that ``datasets`` keeps beside them, with these."""
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    from datasets import ClassLabel, Features

    features = Features.from_arrow_schema(schema)
    return {
        column: list(kind.names)
        for column, kind in features.items()
        if isinstance(kind, ClassLabel)
    }


def _named(batch: list[dict[str, Any]], names: Mapping[str, list[str]]) -> list[dict[str, Any]]:
    """Replace class numbers by their names; -1 is how ``datasets`` writes that there is none."""
    for column, known in names.items():
        for row in batch:
            if isinstance(number := row.get(column), int):
                row[column] = known[number] if 0 <= number < len(known) else None
    return batch
