"""How near a generated answer is to the right ones: exact match and ROUGE-L.

``exact_match`` follows SQuAD (https://arxiv.org/abs/1606.05250) and ``rouge_l`` is the F-measure (beta 1) of the
longest common subsequence of words (Lin 2004, https://aclanthology.org/W04-1013), as in ``rouge-score`` without
stemming. With several right answers the best one counts, as in Natural Instructions (arXiv 2204.07705).
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WORD = re.compile(r"[^\W_]+")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces; a text that has nothing else keeps what it has."""
    lower = text.lower()
    bare = _ARTICLES.sub(" ", lower.translate(_PUNCTUATION))
    return " ".join(bare.split()) or " ".join(lower.split())


def exact_match(answer: str, references: Sequence[str]) -> bool:
    """Whether the answer is one of the references once both are normalised."""
    return normalise(answer) in {normalise(reference) for reference in references}


def words(text: str) -> list[str]:
    """Lower-case runs of letters and digits."""
    return _WORD.findall(text.lower())


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence; ``O(len(a) len(b))`` time, one row of memory."""
    row = [0] * (len(b) + 1)
    for item in a:
        diagonal = 0
        for index, other in enumerate(b, start=1):
            above = row[index]
            row[index] = diagonal + 1 if item == other else max(above, row[index - 1])
            diagonal = above
    return row[-1]


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """Best ROUGE-L F1 over the references, 0 to 1; 0 where either side has no word."""
    found = words(answer)
    best = 0.0
    for reference in references:
        wanted = words(reference)
        common = common_subsequence(found, wanted)
        if common:
            best = max(best, 2 * common / (len(found) + len(wanted)))
    return best
