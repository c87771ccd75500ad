"""Columns that tell how their rows are meant: conversations, and instructions with their answers.

They are recognised where nobody named columns and those by default are not there; what is set wins.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from heterotune_flwr.data.chat import from_chat
from heterotune_flwr.data.values import needed_text, plain_text
from heterotune_flwr.errors import DataError
from heterotune_flwr.schema import DataConfig

_CHATS = ("messages", "conversations", "conversation")
_INSTRUCTION, _INPUT, _OUTPUT = "instruction", "input", "output"
_DEFAULT = DataConfig()
#: How a conversation as JSON text begins.
_JSON_CHAT = re.compile(r"\s*\[\s*\{")


def recognised(row: Mapping[str, Any], data: DataConfig) -> str | None:
    """The column by which a file's first row tells its layout; None: its columns are as configured."""
    text, label = data.text_field, data.label_field
    named = (text, label) != (_DEFAULT.text_field, _DEFAULT.label_field)
    if named or label in row or _is_chat(row.get(text)):
        return None
    known = [column for column in _CHATS if column in row]
    if _INSTRUCTION in row and _OUTPUT in row:
        known.append(_INSTRUCTION)
    return known[0] if known else None


def described(layout: str) -> str:
    """How rows of a recognised layout are read, in one line."""
    if layout == _INSTRUCTION:
        return "read as instructions: the text is 'instruction' and, below it, 'input'; the answer is 'output'"
    return f"read as conversations: the answer is the last reply of {layout!r}, the text what was said before it"


def arranged(
    row: Mapping[str, Any], layout: str | None, data: DataConfig, where: str
) -> Mapping[str, Any]:
    """The row with the configured text and label columns filled.

    Raises DataError: a conversation without a reply, or with an answer beside it; an instruction or output that is
    empty or no text.
    """
    if layout == _INSTRUCTION:
        said = [
            needed_text(row.get(_INSTRUCTION), where, repr(_INSTRUCTION)),
            plain_text(row.get(_INPUT), where, repr(_INPUT)),
        ]
        text = "\n\n".join(part for part in said if part is not None)
        answer = needed_text(row.get(_OUTPUT), where, repr(_OUTPUT))
    else:
        column = layout or data.text_field
        value = row.get(column)
        beside = row.get(data.label_field) is not None
        as_json = not beside and isinstance(value, str) and _JSON_CHAT.match(value)
        if not (layout or as_json or _is_chat(value)):
            return row
        if beside:
            raise DataError(
                f"{where}: {column!r} is a conversation, whose last reply is the answer, but {data.label_field!r} "
                "holds one too; to take the reply, change data.label_field (label-field in a node's settings)"
            )
        text, answer = from_chat(value, column, where)
    return {**row, data.text_field: text, data.label_field: answer}


def _is_chat(value: Any) -> bool:
    """Whether a value is a list of objects: messages, as nothing else that a text column may hold."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)
