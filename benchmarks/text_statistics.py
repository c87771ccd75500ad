"""A text's character n-grams behind a public projection: what the shared discriminant could read without any model.

The control of :mod:`.discriminant`: n-grams of three to five characters over letters and digits, counted and weighed by
how rare they are among the anchors (tf-idf), on the principal axes of the anchors' own, each with variance one there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import svds

_SIZES = (3, 4, 5)


def ngrams(text: str) -> Counter[str]:
    """Character n-grams of a text in lower case, spaces between its words included, with their counts."""
    plain = f" {' '.join(re.findall('[a-z0-9]+', text.lower()))} "
    return Counter(plain[i : i + n] for n in _SIZES for i in range(len(plain) - n + 1))


def projected(
    anchors: Sequence[str], lists: Sequence[Sequence[str]], width: int
) -> list[NDArray[np.float64]]:
    """Lists of texts on the ``width`` principal axes of the anchors' n-grams, in their deviations (``n x width``)."""
    found = Counter(gram for text in anchors for gram in ngrams(text))
    known = sorted(gram for gram, texts in found.items() if texts > 1)
    column = {gram: index for index, gram in enumerate(known)}
    rarity = np.log((1 + len(anchors)) / (1 + np.array([found[gram] for gram in known])))

    def weighed(texts: Sequence[str]) -> csr_matrix:
        entries, columns, ends = [], [], [0]
        for text in texts:
            counts = [(column[g], n) for g, n in sorted(ngrams(text).items()) if g in column]
            values = np.array([(1 + np.log(n)) * rarity[c] for c, n in counts])
            entries += (values / max(float(np.linalg.norm(values)), 1e-12)).tolist()
            columns += [c for c, _ in counts]
            ends.append(len(columns))
        return csr_matrix((entries, columns, ends), shape=(len(texts), len(known)))

    own = weighed(anchors)
    _, _, axes = svds(own, width, rng=np.random.default_rng(0))
    spread = np.asarray(own @ axes.T).std(axis=0)
    return [np.asarray(weighed(texts) @ axes.T) / spread for texts in lists]
