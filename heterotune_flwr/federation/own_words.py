"""What a client's model must not say: runs of words that stand in the client's own texts."""

from __future__ import annotations

import re

from heterotune_flwr.data.partition import ClientData

#: So many words in a row are no coincidence.
RUN = 8
_WORD = re.compile(r"[^\W_]+")


class OwnWords:
    """A client's texts and answers, and whether something repeats them.

    A model can have learnt its examples by heart (arXiv 2012.07805). Shorter answers than :data:`RUN` words pass: on
    most tasks they are what everybody answers.
    """

    def __init__(self, data: ClientData) -> None:
        self._data = data
        self._runs: set[tuple[str, ...]] | None = None

    def repeated_in(self, text: str) -> bool:
        """Whether ``RUN`` words in a row of a text stand in one of the client's, whatever their case or punctuation."""
        runs = _runs(text)
        if not runs:
            return False
        if self._runs is None:  # most answers are short: nothing is read for them
            examples = (*self._data.train, *self._data.personal_test)
            texts = [text for e in examples for text in (e.text, *e.answers)]
            self._runs = {run for text in texts for run in _runs(text)}
        return not runs.isdisjoint(self._runs)


def _runs(text: str) -> set[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    return {tuple(words[start : start + RUN]) for start in range(len(words) - RUN + 1)}
