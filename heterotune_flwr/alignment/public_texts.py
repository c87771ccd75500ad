"""Anchors: the public texts on which different models are aligned (never a client's data)."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.backbones.assets import asset_path
from heterotune_flwr.data.columns import called
from heterotune_flwr.data.tables import rows
from heterotune_flwr.data.text_files import text_lines
from heterotune_flwr.data.values import needed_text, plain_text
from heterotune_flwr.errors import ConfigError, DataError
from heterotune_flwr.schema import AlignmentConfig
from heterotune_flwr.seeds import generator

SHIPPED = ("debian-other", "wordnet", "debian-near")
_TOLD = "its anchors cannot be used"
_COLUMN, _ANSWER = "text", "answer"
#: Words of an answer that are given at most: no model is trained far behind them.
_WORDS = 256


class Anchor(NamedTuple):
    """A public text, and what answers it, or how that begins; "" where nothing does."""

    text: str
    answer: str = ""


def _read(path: Path) -> list[Anchor]:
    """Anchors in their order: the lines of a text file, or ``text`` and perhaps ``answer`` of any data file."""
    try:
        if path.name.removesuffix(".gz").endswith(".txt"):
            lines = (line.rstrip("\r\n") for line in text_lines(path))
            return [Anchor(text) for text in lines if text.strip()]
        anchors = []
        for _, where, found in rows(path):
            row = called(found, _COLUMN, _ANSWER)
            if _COLUMN not in row:
                raise DataError(f"{where}: every anchor needs a text in column {_COLUMN!r}")
            text = needed_text(row[_COLUMN], where, repr(_COLUMN))
            anchors.append(Anchor(text, plain_text(row.get(_ANSWER), where, repr(_ANSWER)) or ""))
        return anchors
    except DataError as error:
        raise DataError(f"the anchors: {error}", _TOLD) from error


def load_anchors(alignment: AlignmentConfig) -> list[str]:
    """Texts of the first ``alignment.count`` anchors of a shipped set, a .txt(.gz) file, or a data file.

    Raises DataError: as :func:`read_anchors`.
    """
    return [anchor.text for anchor in read_anchors(alignment)]


def read_anchors(alignment: AlignmentConfig) -> list[Anchor]:
    """The first ``alignment.count`` anchors with their answers.

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
    found = _read(path)[: alignment.count]
    if len(found) < 10:
        raise DataError(
            f"{name} has {len(found)} anchors; thousands are needed to align models", _TOLD
        )
    return found


def whole_texts(anchors: Sequence[Anchor]) -> list[Anchor]:
    """The anchors without their answers."""
    return [Anchor(anchor.text) for anchor in anchors]


def reading_places(anchors: Sequence[Anchor], alignment: AlignmentConfig) -> list[Anchor]:
    """Where types are compared: each anchor with what of its answer stands already (``alignment.count`` at most).

    On open text a model is trained at every position of an answer, so it is read there too: all anchors after as many
    words of their answers as are drawn for each, then after others, as long as there are any. The same for all types.
    Without answers, and for labels, where the answer begins.
    """
    if alignment.output != "vocabulary":
        return whole_texts(anchors)
    # A long answer has many beginnings: they are made as they are taken.
    turns = itertools.zip_longest(*(_begun(anchor, n) for n, anchor in enumerate(anchors)))
    places = (place for turn in turns for place in turn if place is not None)
    return list(itertools.islice(places, alignment.count))


def _begun(anchor: Anchor, number: int) -> Iterator[Anchor]:
    """An anchor with nothing of its answer, with a word, and so on, in an order that is drawn."""
    words = itertools.islice(re.finditer(r"\S+", anchor.answer), _WORDS)
    ends = [0, *(word.end() for word in words)]
    for place in generator(0, f"anchors.places.{number}").permutation(len(ends)).tolist():
        yield Anchor(anchor.text, anchor.answer[: ends[place]].strip())


def anchor_digest(texts: Sequence[str]) -> str:
    """Identity of an anchor list (hex)."""
    return hashlib.sha256("\x00".join(texts).encode()).hexdigest()


def place_digest(places: Sequence[Anchor]) -> str:
    """Identity of what types are compared on (hex); without answers, of its texts."""
    answers = [place.answer for place in places]
    return anchor_digest(
        [place.text for place in places] + (["", *answers] if any(answers) else [])
    )


def other_anchors() -> ConfigError:
    """What a client says whose anchors are not the server's."""
    return ConfigError.plain(
        "the anchors here are not those of the server; they must be the same texts, with the same answers, in the "
        "same order (alignment.anchors, anchors in a node's settings)"
    )


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
