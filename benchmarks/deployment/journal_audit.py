"""Reads a journal as a book-keeper: is every round there once, in order, and is nothing counted twice?

A run that is resumed repeats what its journal says of rounds after its last checkpoint (docs/journal.md): those lines
belong to the earlier start and are *redone*, which is neither a loss nor a second application, because the bank of the
checkpoint does not hold them. What is checked:

* the rounds that count are 1, 2, 3, ... without a gap, each ``round`` or ``skipped`` once;
* a start goes on after a checkpoint that the journal has announced (or, if the death came between the file and the
  line that announces it, after the next one);
* within one start every client's training is answered at most once a round, for the round that is going on, and a
  round counts no more updates than were answered for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Audit:
    """What a journal with one strategy and seed shows.

    Attributes
    ----------
    rounds
        Numbers of the rounds that count, in order.
    skipped
        Those of them in which no update was usable.
    redone
        Rounds that a resumed run did again.
    starts
        How often a server began (1: never resumed).
    failed_messages
        ``client_failed`` and ``sent_again`` events.
    faults
        One line for everything that must not be; empty for a complete journal.

    """

    rounds: list[int] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    redone: int = 0
    starts: int = 0
    failed_messages: int = 0
    faults: list[str] = field(default_factory=list)
    _safe: int = 0
    _answered: dict[int, list[str]] = field(default_factory=dict)

    @property
    def lost(self) -> int:
        """Rounds that are missing between the first and the last one, or in which nothing was usable."""
        missing = set(range(1, max(self.rounds, default=0) + 1)) - set(self.rounds)
        return len(missing) + len(self.skipped)

    @property
    def last(self) -> int:
        """Number of the last round that counts."""
        return self.rounds[-1] if self.rounds else 0


def audit(events: Iterable[Mapping[str, Any]], expected: int | None = None) -> Audit:
    """Check a journal; ``expected``: how many rounds it must end with."""
    book = Audit()
    for event in events:
        _EVENTS.get(event["event"], _pass)(book, event)
    if expected is not None and book.last != expected:
        book.faults.append(f"the journal ends with round {book.last}, not {expected}")
    return book


def _pass(book: Audit, event: Mapping[str, Any]) -> None:
    """Nothing to check."""


def _start(book: Audit, event: Mapping[str, Any]) -> None:
    book.starts += 1
    book._answered = {}


def _resumed(book: Audit, event: Mapping[str, Any]) -> None:
    number = int(event["round"])
    if not book._safe <= number <= book._safe + 1:
        book.faults.append(f"resumed after round {number}, but round {book._safe} was safe")
    if number > book.last:
        book.faults.append(f"resumed after round {number}, which the journal does not have")
    book.redone += sum(n > number for n in book.rounds)
    book.rounds = [n for n in book.rounds if n <= number]
    book.skipped = [n for n in book.skipped if n <= number]
    book._safe = number


def _reply(book: Audit, event: Mapping[str, Any]) -> None:
    number, client = int(event["round"]), str(event["client_id"])
    answered = book._answered.setdefault(number, [])
    if client in answered:
        book.faults.append(f"round {number}: two answers of {client}")
    if number != book.last + 1:
        book.faults.append(f"round {number}: answered while round {book.last + 1} went on")
    answered.append(client)


def _round(book: Audit, event: Mapping[str, Any]) -> None:
    number = int(event["round"])
    if number != book.last + 1:
        book.faults.append(f"round {number} follows round {book.last}")
    if event["event"] == "skipped":
        book.skipped.append(number)
    elif int(event["clients"]) > len(book._answered.get(number, [])):
        book.faults.append(
            f"round {number} counts {event['clients']} updates of {len(book._answered.get(number, []))} answers"
        )
    book.rounds.append(number)


def _checkpoint(book: Audit, event: Mapping[str, Any]) -> None:
    number = int(event["round"])
    if number != book.last:
        book.faults.append(f"checkpoint of round {number} after round {book.last}")
    book._safe = number


def _failed(book: Audit, event: Mapping[str, Any]) -> None:
    book.failed_messages += 1


_EVENTS = {
    "start": _start,
    "resumed": _resumed,
    "train_reply": _reply,
    "round": _round,
    "skipped": _round,
    "checkpoint": _checkpoint,
    "client_failed": _failed,
    "sent_again": _failed,
}
