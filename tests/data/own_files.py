"""Files of one's own in several forms, and how they are read."""

from __future__ import annotations

import json
from pathlib import Path

from heterotune_flwr.data import Example
from heterotune_flwr.data.sources import read_examples
from heterotune_flwr.schema import DataConfig

SECRET = "SECRET-4711"


def lines(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(path: Path, columns: dict[str, object]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)
    return path


def read(path: Path, **settings: str) -> list[Example]:
    return read_examples(path, DataConfig(**settings))
