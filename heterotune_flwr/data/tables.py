"""Which form a data file has, and the rows of those that are not text: Parquet and saved ``datasets``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from heterotune_flwr.errors import DataError

FORMS = ("jsonl", "csv", "parquet", "dataset")
BINARY = ("parquet", "dataset")
_BATCH = 1024


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk``."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def form_of(path: Path, form: str | None = None) -> str:
    """One of :data:`FORMS`: as told, else by the name.

    Raises
    ------
    DataError
        Neither tells.

    """
    if form is not None:
        if form not in FORMS:
            raise DataError(f"data.format is {form!r}; choose one of {', '.join(FORMS)}")
        return form
    if is_saved_dataset(path):
        return "dataset"
    suffix = Path(path.name.removesuffix(".gz")).suffix.removeprefix(".")
    if suffix not in FORMS[:2] and path.suffix != ".parquet":
        raise DataError(
            f"data file {str(path)!r} is neither .jsonl, .jsonl.gz, .csv nor .parquet, nor a saved dataset; say which "
            "it is with data.format (format in a node's settings)"
        )
    return suffix


def binary_rows(path: Path, form: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a Parquet file or of a saved dataset, numbered from 1.

    Raises
    ------
    DataError
        Damaged, or a collection of several splits without one called ``train``.

    """
    import pyarrow as pa

    try:
        rows = _parquet(path) if form == "parquet" else _saved(path)
        yield from enumerate(rows, start=1)
    except (OSError, ValueError, pa.ArrowException) as error:
        # Only the kind of the error: its text may quote private data, and this line may travel.
        raise DataError(
            f"data file {str(path)!r} cannot be read as {form} ({type(error).__name__}); save it again, or set "
            "data.format (format in a node's settings)"
        ) from error


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as table:
        for batch in table.iter_batches(batch_size=_BATCH):
            yield from batch.to_pylist()


def _saved(path: Path) -> Iterator[dict[str, Any]]:
    from datasets import DatasetDict, load_from_disk

    found = load_from_disk(str(path))
    if isinstance(found, DatasetDict):
        names = sorted(found)
        if "train" not in names and len(names) != 1:
            raise DataError(
                f"data {str(path)!r} has the splits {', '.join(names)} and no 'train'; give the folder of one of them"
            )
        found = found["train" if "train" in names else names[0]]
    for row in found:
        yield dict(row)
