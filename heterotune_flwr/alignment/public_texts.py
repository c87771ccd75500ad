"""Anchors: the public texts on which different models are aligned (never a client's data)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.backbones.assets import asset_path
from heterotune_flwr.data.tables import rows
from heterotune_flwr.data.text_files import text_lines
from heterotune_flwr.data.values import needed_text
from heterotune_flwr.errors import DataError
from heterotune_flwr.schema import AlignmentConfig
from heterotune_flwr.seeds import generator

SHIPPED = ("debian-other", "wordnet", "debian-near")
_TOLD = "its anchors cannot be used"
_COLUMN = "text"


def _read(path: Path) -> list[str]:
    """Anchors in their order: the lines of a text file, or column ``text`` of any data file."""
    try:
        if path.name.removesuffix(".gz").endswith(".txt"):
            return [text for line in text_lines(path) if (text := line.rstrip("\r\n")).strip()]
        texts = []
        for _, where, row in rows(path):
            if _COLUMN not in row:
                raise DataError(f"{where}: every anchor needs a text in column {_COLUMN!r}")
            texts.append(needed_text(row[_COLUMN], where, repr(_COLUMN)))
        return texts
    except DataError as error:
        raise DataError(f"the anchors: {error}", _TOLD) from error


def load_anchors(alignment: AlignmentConfig) -> list[str]:
    """The first ``alignment.count`` anchors of a shipped set, a .txt(.gz) file, or column ``text`` of a data file.

    Raises
    ------
    DataError
        The set is unknown, the file malformed, or there are fewer than 10 anchors.

    """
    name = alignment.anchors
    path: Path | None = Path(name).expanduser()
    if name in SHIPPED:
        path = asset_path(f"anchors/{name}.jsonl.gz")
    if path is None or not path.is_file():
        raise DataError(
            f"alignment.anchors is {name!r}: neither a shipped set ({', '.join(SHIPPED)}) nor a file",
            _TOLD,
        )
    texts = _read(path)[: alignment.count]
    if len(texts) < 10:
        raise DataError(
            f"{name} has {len(texts)} anchors; thousands are needed to align models", _TOLD
        )
    return texts


def anchor_digest(texts: Sequence[str]) -> str:
    """Identity of an anchor list (hex)."""
    return hashlib.sha256("\x00".join(texts).encode()).hexdigest()


def round_anchors(pool: int, count: int, seed: int, round: int) -> list[int]:
    """Indices of the ``count`` anchors, out of the first ``pool``, that a round's predictions are about.

    A function of the run's seed and the round, so that server and clients agree without a message; all of them in
    their order where as many are wanted.
    """
    if count >= pool:
        return list(range(pool))
    drawn = generator(seed, f"consensus.{round}").choice(pool, size=count, replace=False)
    return [int(index) for index in drawn]


def entropies(predictions: NDArray[Any]) -> NDArray[Any]:
    """Entropy, in nats, of the label probabilities (``... x C``) on every anchor."""
    found: NDArray[Any] = -(predictions * np.log(np.maximum(predictions, 1e-12))).sum(axis=-1)
    return found
