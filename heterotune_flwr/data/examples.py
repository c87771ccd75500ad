"""One example: a text, its answer, and whose it is."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Turn:
    """What one side says in a conversation; ``role`` is ``system``, ``user``, ``assistant``, or another's name."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One text and its answer; ``client`` names its natural owner (empty where the file does not say).

    ``label`` is the answer that is trained on; ``references`` are further right ones, for scoring. ``turns`` are what
    was said before the answer, where a conversation was read; its ``text`` is the same without form. ``row`` is where
    it stands in its file, for errors: a line, or the place of a row; 0 where there is no file.
    """

    text: str
    label: str
    client: str = ""
    references: tuple[str, ...] = ()
    turns: tuple[Turn, ...] = ()
    row: int = field(default=0, compare=False, repr=False)

    @property
    def answers(self) -> tuple[str, ...]:
        """All right answers, the one trained on first."""
        return (self.label, *self.references)
