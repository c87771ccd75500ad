"""From an example to token ids: prompt, then one space, then the answer.

The answer is read off the encoding of prompt and answer *together*, so that tokenizers which put
a marker in front of every text (SentencePiece) give the same words as those that do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from heterotune_flwr.backbones.tokens import encode_text
from heterotune_flwr.data.examples import Example
from heterotune_flwr.errors import DataError

#: Stands for a task's text where only the prompt's end matters.
_PROBE = "text"


@dataclass(frozen=True)
class EncodedExample:
    """Token ids of one example; ``answer`` ends with eos where the tokenizer has one."""

    prompt: list[int]
    answer: list[int]


def render_prompt(prompt: str, text: str) -> str:
    """Fill ``{text}`` of the prompt form (DataError: the form has no ``{text}``)."""
    if "{text}" not in prompt:
        raise DataError(
            f"data.prompt {prompt!r} has no {{text}} to fill", "data.prompt has no {text} to fill"
        )
    return prompt.replace("{text}", text)


def encode_opening(tokenizer: Any, text: str) -> list[int]:
    """Ids with the tokenizer's leading special tokens and without a trailing eos."""
    ids = encode_text(tokenizer, text)
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def truncate_prompt(tokenizer: Any, ids: list[int], limit: int) -> list[int]:
    """The last ``limit`` ids, after a leading bos where there is one."""
    if len(ids) <= limit:
        return ids
    if ids[0] == tokenizer.bos_token_id and limit > 1:
        return ids[:1] + ids[len(ids) - limit + 1 :]
    return ids[len(ids) - limit :]


def answer_ids(tokenizer: Any, prompt: str, answer: str) -> list[int]:
    """Ids that " answer" adds after ``prompt`` (rendered), without eos (DataError: the answer adds nothing)."""
    before = encode_opening(tokenizer, prompt)
    together = encode_opening(tokenizer, f"{prompt} {answer}")
    if together[: len(before)] == before:
        ids = together[len(before) :]
    else:  # the tokenizer merges across the boundary
        ids = encode_text(tokenizer, f" {answer}", special=False)
    if not ids:
        raise DataError(f"the answer {answer!r} has no tokens after the prompt")
    return ids


def label_tokens(tokenizer: Any, labels: Sequence[str], prompt: str) -> list[int]:
    """First token of every " label" after the prompt: the words whose logits decide.

    ``prompt`` is the form with ``{text}``.

    Raises DataError: two labels begin with the same token; names both.
    """
    rendered = render_prompt(prompt, _PROBE)
    owners: dict[int, str] = {}
    for label in labels:
        token = answer_ids(tokenizer, rendered, label)[0]
        if token in owners:
            problem = (
                f"labels {owners[token]!r} and {label!r} begin with the same token "
                f"{tokenizer.convert_ids_to_tokens(token)!r} of this backbone; rename one of them "
                "or set train.loss=tokens and alignment.output=vocabulary"
            )
            raise DataError(problem, problem)  # the labels are the run's own
        owners[token] = label
    return list(owners)


def encode_prompt(tokenizer: Any, prompt: str, text: str, max_length: int) -> list[int]:
    """Ids of the rendered prompt; its last position is where the answer is read."""
    ids = encode_opening(tokenizer, render_prompt(prompt, text))
    return truncate_prompt(tokenizer, ids, max_length)


def encode_example(
    tokenizer: Any, prompt: str, example: Example, max_length: int
) -> EncodedExample:
    """Ids of prompt and answer (+eos), together at most ``max_length``; the prompt gives way.

    Of an answer that leaves no room for a prompt the beginning is kept, and half of the length for the prompt's end.
    """
    rendered = render_prompt(prompt, example.text)
    answer = answer_ids(tokenizer, rendered, example.label)
    if tokenizer.eos_token_id is not None:
        answer = [*answer, int(tokenizer.eos_token_id)]
    asked = encode_opening(tokenizer, rendered)
    room = max_length - len(answer)
    if room < 1:
        room = min(len(asked), max_length // 2)
        answer = answer[: max_length - room]
    return EncodedExample(truncate_prompt(tokenizer, asked, room), answer)
