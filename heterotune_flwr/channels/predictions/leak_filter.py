"""What a client's model must not say: runs of words that stand in the client's own texts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from heterotune_flwr.data.partition import ClientData

#: So many words in a row are no coincidence.
RUN = 8
#: Letters of scripts that put no spaces between words count as words (South East Asian ones, Han, Kana).
_WORD = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff]|"
    r"[^\W_\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff]+"
)


def repeating(answers: Sequence[str], own: ClientData) -> set[int]:
    """Which answers have :data:`RUN` words in a row that stand in one of the client's own texts or answers.

    Case, punctuation and accents do not matter. A model can have learnt its examples by heart (arXiv 2012.07805);
    shorter answers pass: on most tasks they are what everybody answers. Memory is that of the answers, not of the data.
    """
    speakers: dict[tuple[str, ...], list[int]] = {}
    for number, answer in enumerate(answers):
        for run in set(_runs(answer)):
            speakers.setdefault(run, []).append(number)
    if not speakers:  # most answers are short: nothing is read for them
        return set()
    found: set[int] = set()
    for example in (*own.train, *own.personal_test, *own.choosing):
        for text in (example.text, *example.answers):
            for run in _runs(text):
                found.update(speakers.get(run, ()))
    return found


def _runs(text: str) -> list[tuple[str, ...]]:
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    words = _WORD.findall(plain.casefold())
    return [tuple(words[start : start + RUN]) for start in range(len(words) - RUN + 1)]
