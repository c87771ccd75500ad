"""How near two collections of texts are to each other, by the words they use."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from heterotune_flwr.seeds import generator

#: Below it two collections are about something else. Shipped anchors have 0.8 to 0.9 to the shipped data; a
#: dictionary has 0.3 to them, 0.5 to film reviews and tweets, 0.6 to newspapers.
NEAR = 0.6
#: Texts of each side that are compared, and how often such are drawn of few.
_TEXTS, _DRAWS = 2000, 5
#: Below it halves of the data themselves have too little in common to tell.
_TELLING = 0.1
#: Shorter words are in all texts.
_WORD = re.compile(r"[^\W\d_]{4,}")


def nearness(texts: Sequence[str], others: Sequence[str], seed: int = 0) -> float | None:
    """How alike the words of two collections are: 1 is as alike as two halves of ``texts`` are to each other.

    It is the affinity of word frequencies (the sum of ``sqrt(p q)``) to as many of ``others`` as a half has, divided by
    that between the halves.

    Returns
    -------
    None where it cannot be told: too few texts, or halves without words in common (scripts without spaces).

    """
    own, public = list(dict.fromkeys(texts)), list(dict.fromkeys(others))
    half = min(len(own) // 2, len(public), _TEXTS)
    if not half:
        return None
    rng = generator(seed, "nearness")
    between = within = 0.0
    for _ in range(1 if half == _TEXTS else _DRAWS):
        drawn = [own[i] for i in rng.permutation(len(own))[: 2 * half]]
        first = _frequencies(drawn[:half])
        within += _affinity(first, _frequencies(drawn[half:]))
        beside = [public[i] for i in rng.permutation(len(public))[:half]]
        between += _affinity(first, _frequencies(beside))
    return between / within if within > _TELLING else None


def _frequencies(texts: Sequence[str]) -> dict[str, float]:
    counts = Counter(word for text in texts for word in _WORD.findall(text.lower()))
    total = sum(counts.values())
    return {word: count / total for word, count in counts.items()}


def _affinity(one: dict[str, float], other: dict[str, float]) -> float:
    return sum(math.sqrt(one[word] * other[word]) for word in sorted(one.keys() & other.keys()))
