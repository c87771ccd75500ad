"""One example: a text, its answer, and whose it is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One text and its answer; ``client`` names its natural owner (empty where the file does not say).

    ``label`` is the answer that is trained on; ``references`` are further right ones, for scoring.
    """

    text: str
    label: str
    client: str = ""
    references: tuple[str, ...] = ()

    @property
    def answers(self) -> tuple[str, ...]:
        """All right answers, the one trained on first."""
        return (self.label, *self.references)
