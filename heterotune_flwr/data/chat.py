"""Chat messages as an example: what was said before the assistant's last reply, and that reply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from heterotune_flwr.config.schema import DataConfig
from heterotune_flwr.errors import DataError

_ANSWERS = ("assistant", "model", "gpt")


def from_chat(messages: Sequence[Any], data: DataConfig, where: str) -> dict[str, str]:
    """Text and label columns of a row whose text column holds a conversation.

    One message before the reply is the text as it stands; of several, each is a line ``role: content``, so that the
    reply is read from the whole conversation. What follows the last reply is left out.

    Parameters
    ----------
    messages
        ``{"role": ..., "content": ...}`` in order.
    data
        Names of the columns.
    where
        File and row, for errors.

    Raises
    ------
    DataError
        A message lacks role or content, or there is no reply, or nothing before it. Contents are never quoted.

    """
    turns: list[tuple[str, str]] = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise DataError(
                f"{where}: message {number} of {data.text_field!r} is no object with texts under 'role' and 'content'"
            )
        turns.append((message["role"], message["content"]))
    last = max((i for i, (role, _) in enumerate(turns) if role in _ANSWERS), default=0)
    if last == 0:
        raise DataError(
            f"{where}: the conversation in {data.text_field!r} has no reply of the assistant after another message"
        )
    if not turns[last][1].strip():
        raise DataError(f"{where}: the last reply of the assistant in {data.text_field!r} is empty")
    before = turns[:last]
    if not any(text.strip() for _, text in before):
        raise DataError(f"{where}: nothing is said in {data.text_field!r} before the last reply")
    said = (
        before[0][1] if len(before) == 1 else "\n".join(f"{role}: {text}" for role, text in before)
    )
    return {data.text_field: said, data.label_field: turns[last][1]}
