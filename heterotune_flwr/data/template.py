"""From an example to token ids, in the one form of a run: its prompt and one space, or the model's own chat template.

An answer is read off the encoding of prompt and answer *together*, so that tokenizers which put
a marker in front of every text (SentencePiece) give the same words as those that do not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

from heterotune_flwr.backbones.tokens import encode_marked, encode_text, encode_texts
from heterotune_flwr.data.chat_template import (
    ASSISTANT,
    SYSTEM,
    USER,
    ChatTemplate,
    alternating,
    has_template,
)
from heterotune_flwr.data.examples import Example, Turn
from heterotune_flwr.errors import ConfigError, DataError
from heterotune_flwr.schema import AUTO, DataConfig

#: Stand for a task's text where only the prompt's end matters.
_PROBES = ("text", "7", "(?)")
#: A last word of a prompt that only says: now the answer.
_CUE = re.compile(
    r"\s+[#*\[(]*\s*(answer|a|output|response|reply|assistant)\s*[:=*\])]+\s*$", re.IGNORECASE
)

#: What a prompt asks: a text alone, or an example with the conversation that it was read from.
Asked = str | Example


@dataclass(frozen=True)
class EncodedExample:
    """Token ids of one example; ``answer`` ends with what ends an answer (:attr:`Form.ending`).

    ``earlier``: which ids of the prompt (from, to) are earlier replies of the same side, with their endings.
    """

    prompt: list[int]
    answer: list[int]
    earlier: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Form:
    """How texts and their answers become token ids of one tokenizer: here plainly, as one text.

    ``prompt`` is the run's, with ``{text}``; ``system`` stands above it. ``stop``: a text before which an answer ends.
    """

    tokenizer: Any
    prompt: str
    max_length: int
    system: str | None = None
    stop: str | None = None

    @property
    def kind(self) -> str:
        """``plain`` or ``chat``."""
        return "plain"

    def render(self, asked: Asked) -> str:
        """The prompt for people: what stands before the answer (DataError: the form has no ``{text}``)."""
        filled = self._filled(_text(asked))
        own = isinstance(asked, Example) and any(turn.role == SYSTEM for turn in asked.turns)
        return filled if self.system is None or own else f"{self.system}\n\n{filled}"

    def prompt_ids(self, asked: Asked, room: int | None = None) -> list[int]:
        """At most ``room`` ids (null: ``data.max_length``) of a prompt; at its last position the answer is read."""
        ids = encode_opening(self.tokenizer, self.render(asked))
        return self._cut(ids, self.max_length if room is None else room)

    def begun_ids(self, asked: Asked, begun: str, room: int | None = None) -> list[int]:
        """A prompt's ids with those of an answer as far as it is given (the last ones, at most half of ``room``)."""
        room = self.max_length if room is None else room
        ids = self._answer_ids(asked, begun) if begun else []
        ids = ids[max(len(ids) - room // 2, 0) :]  # where it stops is where all tokenizers read it
        return [*self.prompt_ids(asked, room - len(ids)), *ids]

    def encode(self, example: Example) -> EncodedExample:
        """Ids of prompt and whole answer, together at most ``data.max_length``; the prompt gives way.

        Of an answer that leaves no room for a prompt the beginning is kept, and half of the length for the prompt's
        end.
        """
        answer = [*self._answer_ids(example, example.label), *self.ending]
        room = self.max_length - len(answer)
        if room < 1:
            room = min(len(self.prompt_ids(example)), self.max_length // 2)
            answer = answer[: self.max_length - room]
        return self._encoded(example, room, answer)

    @property
    def ending(self) -> list[int]:
        """Ids that end every answer; empty where the tokenizer has no end of text."""
        end = self.tokenizer.eos_token_id
        return [] if end is None else [int(end)]

    def sizes(self, examples: Sequence[Example]) -> tuple[list[int], list[int]]:
        """How many ids whole prompts have, and whole answers with their ending."""
        rendered = [self.render(example) for example in examples]
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
        return [self._answer_ids(_PROBES[0], label) for label in labels]

    def _filled(self, text: str) -> str:
        if "{text}" not in self.prompt:
            raise DataError(
                f"data.prompt {self.prompt!r} has no {{text}} to fill",
                "data.prompt has no {text} to fill",
            )
        return self.prompt.replace("{text}", text)

    def _answer_ids(self, asked: Asked, answer: str) -> list[int]:
        return answer_ids(self.tokenizer, self.render(asked), answer)

    def _encoded(self, example: Example, room: int, answer: list[int]) -> EncodedExample:
        return EncodedExample(self.prompt_ids(example, room), answer)

    def _cut(self, ids: list[int], limit: int) -> list[int]:
        """The last ``limit`` ids, after a leading bos where there is one."""
        if len(ids) <= limit:
            return ids
        if ids[0] == self.tokenizer.bos_token_id and limit > 1:
            return ids[:1] + ids[len(ids) - limit + 1 :]
        return ids[len(ids) - limit :]


@dataclass(frozen=True)
class _Fitted:
    """A conversation that fits: what is left of it, as text and as ids."""

    turns: list[Turn]
    system: str | None
    text: str
    ids: list[int]


@dataclass(frozen=True, kw_only=True)
class ChatForm(Form):
    """Texts as turns of a conversation, in the model's own chat template.

    A text is a user's turn: the prompt's words around it, without a last one that only asks for the answer. A
    conversation's turns are taken as they are, and its system turn in the place of the run's.
    """

    template: ChatTemplate

    @property
    def kind(self) -> str:
        """See :meth:`Form.kind`."""
        return "chat"

    def render(self, asked: Asked) -> str:
        """See :meth:`Form.render`."""
        system, turns, _, _ = self._conversation(asked)
        return self.template.before(system, turns)

    def prompt_ids(self, asked: Asked, room: int | None = None) -> list[int]:
        """See :meth:`Form.prompt_ids`; the oldest turns give way, then the beginning of what the user says."""
        return self._fit(asked, self.max_length if room is None else room).ids

    @property
    def ending(self) -> list[int]:
        """The template's end of a turn."""
        return list(self.template.ending)

    def sizes(self, examples: Sequence[Example]) -> tuple[list[int], list[int]]:
        """See :meth:`Form.sizes`."""
        prompts = [len(encode_marked(self.tokenizer, self.render(example))) for example in examples]
        answers = [len(ids) for ids in self.label_ids([example.label for example in examples])]
        return prompts, [count + len(self.ending) for count in answers]

    @cached_property
    def _user_prompt(self) -> str:
        shorter = _CUE.sub("", self.prompt)
        return shorter if "{text}" in shorter else self.prompt

    @cached_property
    def _opening(self) -> tuple[str, list[int]]:
        """The prompt of a probe and its ids: the same stands nearest before any answer."""
        text = self.template.before(None, [Turn(USER, _PROBES[0])])
        return text, encode_marked(self.tokenizer, text)

    def _conversation(self, asked: Asked) -> tuple[str | None, list[Turn], str, str]:
        """System's text, turns, and of the last one the form with ``{text}`` and the text."""
        text = _text(asked)
        if isinstance(asked, Example) and asked.turns:
            system, turns = alternating(asked.turns, text)
            return system or self.system, turns, "{text}", turns[-1].content
        return self.system, [Turn(USER, self.said(text))], self._user_prompt, text

    def said(self, text: str) -> str:
        """What the user says of a text: the prompt around it (DataError: the form has no ``{text}``)."""
        self._filled(text)
        return self._user_prompt.replace("{text}", text).strip()

    def _fit(self, asked: Asked, room: int) -> _Fitted:
        system, turns, form, text = self._conversation(asked)
        fitted = self._fitted(system, turns)
        while len(fitted.ids) > room and len(turns) > 1:
            turns = turns[2:]
            fitted = self._fitted(system, turns)
        return fitted if len(fitted.ids) <= room else self._shortened(system, text, form, room)

    def _shortened(self, system: str | None, text: str, form: str, room: int) -> _Fitted:
        """As much of a text's end as fits, in whole words; of a template that does not fit alone its last ids."""

        def kept(count: int) -> _Fitted:
            end = text[len(text) - count :]
            if 0 < count < len(text) and not text[len(text) - count - 1].isspace():
                end = end.partition(" ")[2] or end
            said = form.replace("{text}", end).strip()
            return self._fitted(system, [Turn(USER, said)])

        fits, too_many = 0, len(text)
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if len(kept(middle).ids) <= room:
                fits = middle
            else:
                too_many = middle
        found = kept(fits)
        return _Fitted(found.turns, system, found.text, found.ids[-room:])

    def _fitted(self, system: str | None, turns: list[Turn]) -> _Fitted:
        text = self.template.before(system, turns)
        return _Fitted(turns, system, text, encode_marked(self.tokenizer, text))

    def _answer_ids(self, asked: Asked, answer: str) -> list[int]:
        written = self.template.answer(answer)
        opening, before = self._opening
        together = encode_marked(self.tokenizer, opening + written)
        merged = together[: len(before)] != before  # across the boundary
        ids = encode_marked(self.tokenizer, written) if merged else together[len(before) :]
        if not ids:
            raise DataError(f"the answer {answer!r} has no tokens after the prompt")
        return ids

    def _encoded(self, example: Example, room: int, answer: list[int]) -> EncodedExample:
        fitted = self._fit(example, room)
        return EncodedExample(fitted.ids, answer, tuple(self._earlier(fitted)))

    def _earlier(self, fitted: _Fitted) -> Iterator[tuple[int, int]]:
        """Where earlier replies stand, of those that the template writes as it would write a last one."""
        for number, turn in enumerate(fitted.turns):
            if turn.role == ASSISTANT:
                before = self.template.before(fitted.system, fitted.turns[:number])
                prompt = encode_marked(self.tokenizer, before)
                whole = [*prompt, *self._answer_ids("", turn.content), *self.ending]
                if fitted.ids[: len(whole)] == whole:
                    yield len(prompt), len(whole)


def _text(asked: Asked) -> str:
    return asked if isinstance(asked, str) else asked.text


def make_form(tokenizer: Any, data: DataConfig) -> Form:
    """The form of a run's examples for one tokenizer.

    Raises ConfigError: ``data.template`` is ``chat`` and the tokenizer has no template, or none that can be used, or it
    alone is longer than ``data.max_length``.
    """
    chat = data.template == "chat" or (data.template == AUTO and has_template(tokenizer))
    stop = data.stop if data.stop != AUTO else None if chat else "\n"
    common = (tokenizer, data.prompt, data.max_length, data.system, stop)
    if not chat:
        return Form(*common)
    form = ChatForm(*common, template=ChatTemplate.of(tokenizer))
    around = len(encode_marked(tokenizer, form.render("")))
    if around >= data.max_length:
        raise ConfigError(
            f"data.max_length is {data.max_length}, but the chat template of this backbone takes {around} tokens "
            "without any text; raise it, or set data.template=plain",
            "data.max_length: the chat template of a backbone takes more without any text",
        )
    return form


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
