"""From an example to token ids: prompt, then one space, then the answer.

The answer is read off the encoding of prompt and answer *together*, so that tokenizers which put
a marker in front of every text (SentencePiece) give the same words as those that do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from heterotune_flwr.backbones.tokens import encode_text, encode_texts, plainly
from heterotune_flwr.data.examples import Example
from heterotune_flwr.errors import DataError
from heterotune_flwr.schema import DataConfig

#: Stand for a task's text where only the prompt's end matters.
_PROBES = ("text", "7", "(?)")


@dataclass(frozen=True)
class EncodedExample:
    """Token ids of one example; ``answer`` ends with what ends an answer (:attr:`Form.ending`)."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Form:
    """How texts and their answers become token ids of one tokenizer; ``prompt`` is the run's, with ``{text}``."""

    tokenizer: Any
    prompt: str
    max_length: int

    def render(self, text: str) -> str:
        """The prompt for people: what stands before the answer (DataError: the form has no ``{text}``)."""
        if "{text}" not in self.prompt:
            raise DataError(
                f"data.prompt {self.prompt!r} has no {{text}} to fill",
                "data.prompt has no {text} to fill",
            )
        return self.prompt.replace("{text}", text)

    def prompt_ids(self, text: str, room: int | None = None) -> list[int]:
        """At most ``room`` ids (null: ``data.max_length``) of a prompt; at its last position the answer is read."""
        ids = encode_opening(self.tokenizer, self.render(text))
        return self._cut(ids, self.max_length if room is None else room)

    def encode(self, example: Example) -> EncodedExample:
        """Ids of prompt and whole answer, together at most ``data.max_length``; the prompt gives way.

        Of an answer that leaves no room for a prompt the beginning is kept, and half of the length for the prompt's
        end.
        """
        rendered = self.render(example.text)
        answer = [*answer_ids(self.tokenizer, rendered, example.label), *self.ending]
        asked = encode_opening(self.tokenizer, rendered)
        room = self.max_length - len(answer)
        if room < 1:
            room = min(len(asked), self.max_length // 2)
            answer = answer[: self.max_length - room]
        return EncodedExample(self._cut(asked, room), answer)

    @property
    def ending(self) -> list[int]:
        """Ids that end every answer; empty where the tokenizer has no end of text."""
        end = self.tokenizer.eos_token_id
        return [] if end is None else [int(end)]

    def sizes(self, examples: Sequence[Example]) -> tuple[list[int], list[int]]:
        """How many ids whole prompts have, and whole answers with their ending."""
        rendered = [self.render(example.text) for example in examples]
        whole = [f"{text} {e.label}" for text, e in zip(rendered, examples, strict=True)]
        prompts, both = (
            [len(ids) for ids in encode_texts(self.tokenizer, texts)] for texts in (rendered, whole)
        )
        return prompts, [max(b - p, 1) + 1 for b, p in zip(both, prompts, strict=True)]

    def prompt_end(self) -> list[int]:
        """The ids with which every whole prompt ends, whatever its text (none where a prompt ends with its text)."""
        backwards = (self.prompt_ids(probe, 10**6)[::-1] for probe in _PROBES)
        same = takewhile(lambda ids: len(set(ids)) == 1, zip(*backwards, strict=False))
        return [ids[0] for ids in same][::-1]

    def label_ids(self, labels: Sequence[str]) -> list[list[int]]:
        """Ids of every label as a whole answer, without :attr:`ending` (DataError: one has no tokens)."""
        rendered = self.render(_PROBES[0])
        return [answer_ids(self.tokenizer, rendered, label) for label in labels]

    def prompt_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """:meth:`prompt_ids`, and which letters of :meth:`render` (from, to) each id stands for (fast tokenizers)."""
        encoded = self.tokenizer(
            self.render(text), return_offsets_mapping=True, **plainly(self.tokenizer)
        )
        ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
        return self._cut(ids, self.max_length), self._cut(offsets, self.max_length, ids[0])

    def _cut(self, rows: list[Any], limit: int, first: int | None = None) -> list[Any]:
        """The last ``limit`` rows, after a leading bos (``first`` is the first id) where there is one."""
        if len(rows) <= limit:
            return rows
        if (rows[0] if first is None else first) == self.tokenizer.bos_token_id and limit > 1:
            return rows[:1] + rows[len(rows) - limit + 1 :]
        return rows[len(rows) - limit :]


def make_form(tokenizer: Any, data: DataConfig) -> Form:
    """The form of a run's examples for one tokenizer."""
    return Form(tokenizer, data.prompt, data.max_length)


def encode_opening(tokenizer: Any, text: str) -> list[int]:
    """Ids with the tokenizer's leading special tokens and without a trailing eos."""
    ids = encode_text(tokenizer, text)
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


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
