"""Chat messages as an example: the turns before the assistant's last reply, and that reply."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from heterotune_flwr.data.examples import Turn
from heterotune_flwr.errors import DataError

#: Roles of whoever answers.
ANSWERS = ("assistant", "model")
#: Names of who speaks and what: as chat templates take them, and as ShareGPT's files have them.
_FORMS = (("role", "content"), ("from", "value"))
#: ShareGPT's speakers, by the names that all others use.
_SPEAKERS = {"human": "user", "gpt": "assistant"}


def from_chat(value: Any, column: str, where: str) -> tuple[tuple[Turn, ...], str]:
    """Turns and answer of a conversation; what follows the last reply is left out.

    ``value`` is a list of ``{"role": ..., "content": ...}`` (or ShareGPT's ``from`` and ``value``) in order, or one as
    JSON text.

    Raises DataError: a message lacks its role or content, or there is no reply, or nothing before it. Contents are
    never quoted.
    """
    turns = turns_of(value, column, where)
    last = max((i for i, turn in enumerate(turns) if turn.role in ANSWERS), default=0)
    if last == 0:
        raise DataError(
            f"{where}: the conversation in {column!r} has no reply of the assistant after another message"
        )
    answer = turns[last].content
    if not answer.strip():
        raise DataError(f"{where}: the last reply of the assistant in {column!r} is empty")
    before = turns[:last]
    if not any(turn.content.strip() for turn in before):
        raise DataError(f"{where}: nothing is said in {column!r} before the last reply")
    return tuple(before), answer


def turns_of(value: Any, column: str, where: str) -> list[Turn]:
    """All turns of a conversation, its form as of :func:`from_chat` (DataError: it is none)."""
    return [
        _turn(message, f"{where}: message {number} of {column!r}")
        for number, message in enumerate(_messages(value, column, where), start=1)
    ]


def flattened(turns: Sequence[Turn]) -> str:
    """A conversation as one text: a single turn as it stands, of several each a line ``role: content``."""
    if len(turns) == 1:
        return turns[0].content
    return "\n".join(f"{turn.role}: {turn.content}" for turn in turns)


def _messages(value: Any, column: str, where: str) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, list):
        raise DataError(
            f"{where}: {column!r} is no conversation: a list of messages, or one as JSON text"
        )
    return value


def _turn(message: Any, what: str) -> Turn:
    if isinstance(message, dict):
        for speaker, content in _FORMS:
            role, text = message.get(speaker), message.get(content)
            if isinstance(role, str) and isinstance(text, str):
                return Turn(_SPEAKERS.get(role, role), text)
    raise DataError(
        f"{what} is no object with texts under 'role' and 'content' (or 'from' and 'value')"
    )
