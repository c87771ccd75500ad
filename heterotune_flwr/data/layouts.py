"""Columns that tell how their rows are meant: conversations, instructions, and questions with their answers.

They are recognised where nobody named columns and those by default are not there; what is set wins.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from heterotune_flwr.data.chat import flattened, from_chat
from heterotune_flwr.data.columns import called
from heterotune_flwr.data.examples import Turn
from heterotune_flwr.data.values import needed_text, plain_text
from heterotune_flwr.errors import DataError
from heterotune_flwr.schema import DataConfig

_CHATS = ("messages", "conversations", "conversation")
_INSTRUCTION, _INPUT, _OUTPUT = "instruction", "input", "output"
#: Columns of what is asked and of its answer.
_PAIRS = (
    (_INSTRUCTION, _OUTPUT), ("prompt", "response"), ("prompt", "completion"), ("question", "answer"),
    (_INSTRUCTION, "response"), ("question", "response"),
)  # fmt: skip
_NAMES = tuple(dict.fromkeys((*_CHATS, *(name for pair in _PAIRS for name in pair), _INPUT)))
_DEFAULT = DataConfig()
#: How a conversation as JSON text begins.
_JSON_CHAT = re.compile(r"\s*\[\s*\{")


@dataclass(frozen=True)
class Layout:
    """A recognised layout: the column of what is asked, and that of the answer; None where both are a conversation."""

    asked: str
    answer: str | None

    def described(self) -> str:
        """How rows are read, in one line."""
        if self.answer is None:
            asked = f"the last reply of {self.asked!r}, the text what was said before it"
            return f"read as conversations: the answer is {asked}"
        below = f" and, below it, {_INPUT!r}" if self.answer == _OUTPUT else ""
        kind = "instructions" if self.asked == _INSTRUCTION else "questions"
        return f"read as {kind}: the text is {self.asked!r}{below}; the answer is {self.answer!r}"


def as_asked(row: Mapping[str, Any], data: DataConfig) -> Mapping[str, Any]:
    """A row whose columns have the names that settings and layouts ask for (:func:`.columns.called`)."""
    own = (data.text_field, data.label_field, data.client_field, data.references_field)
    return called(row, *own, *_NAMES)


def recognised(row: Mapping[str, Any], data: DataConfig) -> Layout | None:
    """The layout that a file's first row (:func:`as_asked`) tells; None: its columns are as configured."""
    text, label = data.text_field, data.label_field
    named = (text, label) != (_DEFAULT.text_field, _DEFAULT.label_field)
    if named or label in row or _is_chat(row.get(text)):
        return None
    known = [Layout(column, None) for column in _CHATS if column in row]
    known += [Layout(*pair) for pair in _PAIRS if pair[0] in row and pair[1] in row]
    return known[0] if known else None


def arranged(
    row: Mapping[str, Any], layout: Layout | None, data: DataConfig, where: str
) -> tuple[Mapping[str, Any], tuple[Turn, ...]]:
    """The row with the configured text and label columns filled, and the turns of a conversation.

    Raises DataError: a conversation without a reply, or with an answer beside it; an instruction or output that is
    empty or no text.
    """
    turns: tuple[Turn, ...] = ()
    if layout is not None and layout.answer is not None:
        text = needed_text(row.get(layout.asked), where, repr(layout.asked))
        below = (
            plain_text(row.get(_INPUT), where, repr(_INPUT)) if layout.answer == _OUTPUT else None
        )
        text = text if below is None else f"{text}\n\n{below}"
        answer = needed_text(row.get(layout.answer), where, repr(layout.answer))
    else:
        column = layout.asked if layout else data.text_field
        value = row.get(column)
        beside = row.get(data.label_field) is not None
        as_json = not beside and isinstance(value, str) and _JSON_CHAT.match(value)
        if not (layout or as_json or _is_chat(value)):
            return row, ()
        if beside:
            raise DataError(
                f"{where}: {column!r} is a conversation, whose last reply is the answer, but {data.label_field!r} "
                "holds one too; to take the reply, change data.label_field (label-field in a node's settings)"
            )
        turns, answer = from_chat(value, column, where)
        text = flattened(turns)
    return {**row, data.text_field: text, data.label_field: answer}, turns


def _is_chat(value: Any) -> bool:
    """Whether a value is a list of objects: messages, as nothing else that a text column may hold."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)
