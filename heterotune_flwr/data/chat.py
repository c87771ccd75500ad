"""Chat messages as an example: what was said before the assistant's last reply, and that reply."""

from __future__ import annotations

import json
from typing import Any

from heterotune_flwr.errors import DataError

_ANSWERS = ("assistant", "model")
#: Names of who speaks and what: as chat templates take them, and as ShareGPT's files have them.
_FORMS = (("role", "content"), ("from", "value"))
#: ShareGPT's speakers, by the names that all others use.
_SPEAKERS = {"human": "user", "gpt": "assistant"}


def from_chat(value: Any, column: str, where: str) -> tuple[str, str]:
    """Text and answer of a conversation.

    One message before the reply is the text as it stands; of several, each is a line ``role: content``, so that the
    reply is read from the whole conversation. What follows the last reply is left out.

    ``value`` is a list of ``{"role": ..., "content": ...}`` (or ShareGPT's ``from`` and ``value``) in order, or one as
    JSON text.

    Raises DataError: a message lacks its role or content, or there is no reply, or nothing before it. Contents are
    never quoted.
    """
    turns = [
        _turn(message, f"{where}: message {number} of {column!r}")
        for number, message in enumerate(_messages(value, column, where), start=1)
    ]
    last = max((i for i, (role, _) in enumerate(turns) if role in _ANSWERS), default=0)
    if last == 0:
        raise DataError(
            f"{where}: the conversation in {column!r} has no reply of the assistant after another message"
        )
    answer = turns[last][1]
    if not answer.strip():
        raise DataError(f"{where}: the last reply of the assistant in {column!r} is empty")
    before = turns[:last]
    if not any(text.strip() for _, text in before):
        raise DataError(f"{where}: nothing is said in {column!r} before the last reply")
    if len(before) == 1:
        return before[0][1], answer
    return "\n".join(f"{role}: {text}" for role, text in before), answer


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


def _turn(message: Any, what: str) -> tuple[str, str]:
    if isinstance(message, dict):
        for speaker, content in _FORMS:
            role, text = message.get(speaker), message.get(content)
            if isinstance(role, str) and isinstance(text, str):
                return _SPEAKERS.get(role, role), text
    raise DataError(
        f"{what} is no object with texts under 'role' and 'content' (or 'from' and 'value')"
    )
