"""How near a generated answer is to the right ones: exact match and ROUGE-L, in any script.

``exact_match`` follows SQuAD (https://arxiv.org/abs/1606.05250) and ``rouge_l`` is the F-measure (beta 1) of the
longest common subsequence of words (Lin 2004, https://aclanthology.org/W04-1013), as in ``rouge-score`` without
stemming. With several right answers the best one counts, as in Natural Instructions (arXiv 2204.07705).

Both read texts by their Unicode properties: a word is letters, the marks that belong to them, and digits; in scripts
that put no spaces between words every character (with its marks) is a word. Texts are compared in one form (NFKC, case
folded). On plain English this is what the two publications do.
"""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Sequence

import regex

_ARTICLES = regex.compile(r"\b(a|an|the)\b")
#: Scripts without spaces between words.
_SPACELESS = (
    r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tai_Le}\p{New_Tai_Lue}\p{Tai_Tham}"
    r"\p{Tai_Viet}\p{Javanese}\p{Balinese}"
)
_WORD = regex.compile(
    rf"[[{_SPACELESS}]&&[\p{{L}}\p{{N}}]]\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--[{_SPACELESS}]]+",
    regex.V1,
)
#: Punctuation of every script, and the symbols that ASCII counts as such.
_PUNCTUATION = regex.compile(rf"[\p{{P}}{regex.escape(string.punctuation)}]")
#: Characters without a shape of their own (joiners, direction marks, soft hyphens).
_INVISIBLE = regex.compile(r"\p{Cf}")


def folded(text: str) -> str:
    """The text in the form in which texts are compared: NFKC, case folded, nothing invisible."""
    visible = _INVISIBLE.sub("", text)
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", visible).casefold())


def normalise(text: str) -> str:
    """Case folded, no punctuation, no articles, single spaces; a text that has nothing else keeps what it has."""
    lower = folded(text)
    bare = _ARTICLES.sub(" ", _PUNCTUATION.sub("", lower))
    return " ".join(bare.split()) or " ".join(lower.split())


def exact_match(answer: str, references: Sequence[str]) -> bool:
    """Whether the answer is one of the references once both are normalised."""
    return normalise(answer) in {normalise(reference) for reference in references}


def words(text: str) -> list[str]:
    """Words of the folded text; of scripts without spaces, its characters."""
    return [str(word) for word in _WORD.findall(folded(text))]


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
