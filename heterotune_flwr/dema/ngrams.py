"""A view of a text that needs no model: its character n-grams, behind a projection that is the same everywhere.

N-grams of three to five characters over letters and digits, weighed by how rare they are among the anchors (tf-idf,
`Salton and Buckley 1988 <https://doi.org/10.1016/0306-4573(88)90021-0>`_), on the principal axes of the anchors' own.
The anchors are public and, in a simulation, the same for every client, so nothing has to be aligned, and nothing is
sent for it. A shared discriminant may read it beside the views of the models (``method.ngrams``).
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.errors import ConfigError

if TYPE_CHECKING:  # a client's processes start without it: hardly any reads n-grams
    from scipy.sparse import csr_matrix

_SIZES = (3, 4, 5)
#: Letters and digits of any script.
_WORD = r"[^\W_]+"
#: Anchors in which an n-gram must stand to count.
_LEAST = 2
#: An axis on which the anchors spread less than this share of what they do on the first is none.
_FLAT = 1e-6


def ngrams(text: str) -> Counter[str]:
    """Character n-grams of a text in lower case, spaces between its words included, with their counts."""
    plain = f" {' '.join(re.findall(_WORD, text.lower()))} "
    return Counter(plain[i : i + n] for n in _SIZES for i in range(len(plain) - n + 1))


@dataclass(frozen=True, eq=False)
class NgramView:
    """The projection: public, and the same on every client.

    ``columns``: n-gram -> column (``V``); ``rarity``: idf of each (``V``); ``axes``: ``width x V``, of which the
    anchors have variance 1.
    """

    columns: Mapping[str, int]
    rarity: NDArray[np.float64]
    axes: NDArray[np.float32]

    @classmethod
    def of(cls, anchors: Sequence[str], width: int) -> NgramView:
        """The principal axes of the anchors' n-grams (seconds for 6,000 texts).

        Raises
        ------
        ConfigError
            The anchors have fewer axes than ``width``.

        """
        from scipy.sparse.linalg import svds

        found = Counter(gram for text in anchors for gram in ngrams(text))
        known = sorted(gram for gram, texts in found.items() if texts >= _LEAST)
        most = min(len(anchors), len(known)) - 1
        if width > most:
            raise ConfigError(_too_few(width, max(most, 0), len(anchors)))
        rarity = np.log((1 + len(anchors)) / (1 + np.array([found[gram] for gram in known])))
        bare = cls(
            {gram: index for index, gram in enumerate(known)},
            rarity,
            np.zeros((0, len(known)), np.float32),
        )
        own = bare.weighed(anchors)
        # A start vector of its own would make the axes of every process others (in their last digits, and their signs).
        _, lengths, axes = svds(own, width, v0=np.ones(min(own.shape)))
        found_axes = int((lengths > _FLAT * lengths.max()).sum())
        if found_axes < width:
            raise ConfigError(_too_few(width, found_axes, len(anchors)))
        axes *= np.sign(axes[np.arange(width), np.abs(axes).argmax(axis=1)])[:, None]
        spread = np.maximum(np.asarray(own @ axes.T).std(axis=0), 1e-12)
        return cls(bare.columns, rarity, (axes / spread[:, None]).astype(np.float32))

    def weighed(self, texts: Sequence[str]) -> csr_matrix:
        """Texts as tf-idf rows of length 1 (``n x V``); zeros where no n-gram is known."""
        from scipy.sparse import csr_matrix

        entries: list[float] = []
        columns: list[int] = []
        ends = [0]
        for text in texts:
            counts = [
                (self.columns[g], n) for g, n in sorted(ngrams(text).items()) if g in self.columns
            ]
            values = np.array([(1 + np.log(n)) * self.rarity[column] for column, n in counts])
            entries += (values / max(float(np.linalg.norm(values)), 1e-12)).tolist()
            columns += [column for column, _ in counts]
            ends.append(len(columns))
        return csr_matrix((entries, columns, ends), shape=(len(texts), len(self.columns)))

    def of_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Latents of texts (``n x width``, in standard deviations over the anchors)."""
        return np.asarray(self.weighed(texts).astype(np.float32) @ self.axes.T)


def _too_few(width: int, axes: int, anchors: int) -> str:
    return (
        f"method.ngrams is {width}, but the n-grams of {anchors} anchors have {axes} axes; lower it, or give more, "
        "and more different, anchors"
    )


@functools.lru_cache(maxsize=2)
def _view(anchors: tuple[str, ...], width: int) -> NgramView:
    return NgramView.of(anchors, width)


@functools.lru_cache(maxsize=16)
def ngram_latents(
    anchors: tuple[str, ...], width: int, texts: tuple[str, ...]
) -> NDArray[np.float32]:
    """Latents of texts behind the view of some anchors; both are kept in this process."""
    return _view(anchors, width).of_texts(texts)
