"""A model taken home, ready to answer: in the form it was trained in, by any of its three models."""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from heterotune_flwr.backbones.loading import quieten_libraries
from heterotune_flwr.backbones.reader import batches
from heterotune_flwr.data.chat import ANSWERS, flattened, turns_of
from heterotune_flwr.data.examples import Example, Turn
from heterotune_flwr.data.template import Asked, ChatForm
from heterotune_flwr.errors import ConfigError, DataError
from heterotune_flwr.export.facts import ExportFacts
from heterotune_flwr.export.opened import OpenedExport, open_export
from heterotune_flwr.export.write import check_out
from heterotune_flwr.fields import nearest
from heterotune_flwr.protocol.metrics import MODEL_TITLES
from heterotune_flwr.tuning.forward import final_states
from heterotune_flwr.tuning.generation import Tell, generate_answers, write_answer

#: Which models may answer, by the names that people see, in the order in which they are shown.
_NAMES = {title: name for name, title in MODEL_TITLES.items()}
Message = Mapping[str, str]
#: A text, or the messages of a conversation.
Question = str | Sequence[Message]
#: No token stands for more letters than this; of a longer text the beginning is left out before it is read.
_LETTERS_A_TOKEN = 32
#: Room for any prompt.
_ANY = 10**9


@dataclass(frozen=True)
class Prompt:
    """A prompt as token ids; ``cut``: its beginning was left out, for the model reads no more."""

    ids: list[int]
    cut: bool = False


@dataclass(frozen=True)
class Choice:
    """A label, and its probability (0 to 1) among the labels."""

    label: str
    probability: float

    def __str__(self) -> str:
        """As people read it."""
        return f"{self.label}  ({100 * self.probability:.0f} %)"


class Model:
    """A model taken home from a federation.

    Wherever ``using`` can be given, it is ``untouched``, ``alone`` or ``federated``; None is the one that the folder
    itself holds. ConfigError: there is no such model.
    """

    def __init__(self, opened: OpenedExport) -> None:
        self._opened = opened

    def __repr__(self) -> str:
        """Whose it is, on which backbone, and which models are there."""
        record = self.facts.record
        whose = "all clients of the type" if self.facts.whole_type else record.client_id
        return f"Model({record.type_key}, {record.strategy}, {whose}: {', '.join(self.names)})"

    @property
    def folder(self) -> Path:
        """Where it was read from."""
        return self._opened.folder

    @property
    def facts(self) -> ExportFacts:
        """What is known about it: backbone, data, what it took, metrics."""
        return self._opened.facts

    @property
    def model(self) -> Any:
        """PEFT's model, with the adapters ``federated`` and ``alone``."""
        return self._opened.model

    @property
    def tokenizer(self) -> Any:
        """The backbone's tokenizer."""
        return self._opened.backbone.tokenizer

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The closed set that its answers are from; None: it writes text."""
        task = self._opened.task
        return task.labels if task.kind == "labels" else None

    @property
    def names(self) -> list[str]:
        """Which models can answer."""
        return [name for name, inside in _NAMES.items() if inside in self._opened.names]

    @property
    def in_template(self) -> bool:
        """Whether it was trained in its backbone's own chat template."""
        return isinstance(self._opened.task.form, ChatForm)

    @property
    def chats(self) -> bool:
        """Whether it answers conversations: in its backbone's own chat template."""
        return self.in_template and self.labels is None

    def message(self, text: str) -> dict[str, str]:
        """A text as the user's next message, with the prompt around it that the model was trained with."""
        form = self._opened.task.form
        if isinstance(form, ChatForm) and not self.facts.record.form.turns:
            text = form.said(text)
        return {"role": "user", "content": text}

    def name(self, using: str | None = None) -> str:
        """The model that answers (ConfigError: there is no such model here)."""
        chosen = self.facts.model if using is None else using
        if chosen not in self.names:
            raise ConfigError(
                f"there is no model {chosen!r} in {self.folder}{nearest(chosen, self.names)} "
                f"(there are: {', '.join(self.names)})"
            )
        return chosen

    @contextmanager
    def acting(self, using: str | None = None) -> Iterator[Any]:
        """Let one of the models act for a while; gives PEFT's model."""
        with self._opened.using(_NAMES[self.name(using)]):
            yield self.model

    def generate(
        self,
        question: Question,
        *,
        using: str | None = None,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        tell: Tell | None = None,
    ) -> str:
        """Answer to a text or conversation; of a closed label set, the label.

        Parameters
        ----------
        question
            A text, or messages like ``{"role": "user", "content": "..."}``.
        using
            Which model.
        max_tokens
            Tokens of the answer at most; None: as it was tested with.
        temperature
            0: the likeliest token each time; above it, tokens are drawn.
        tell
            Is given the answer piece by piece while it is written.

        Raises
        ------
        ConfigError
            A number that cannot be, or no such model.
        DataError
            Nothing is asked, or what is given is neither a text nor a conversation.

        """
        name = self.name(using)
        if self.labels is not None:
            (choice,) = self.classify([question], using=name)
            if tell is not None:
                tell(choice.label)
            return choice.label
        if not 0 <= temperature < math.inf:
            raise ConfigError(f"temperature is {temperature}; it must be a number from 0 on")
        prompt, limit = self.prompt(question, max_tokens), self.limit(max_tokens)
        with self._opened.using(_NAMES[name]) as adapter:
            form = self._opened.task.form
            return write_answer(
                adapter, prompt.ids, limit, form.stop, form.ending, temperature, tell
            )

    def generate_all(
        self,
        questions: Sequence[Question],
        *,
        using: str | None = None,
        max_tokens: int | None = None,
        temperature: float = 0.0,
    ) -> list[str]:
        """Answers to several, in their order, as :meth:`generate`; greedy ones are written side by side."""
        name = self.name(using)
        if temperature:
            return [
                self.generate(one, using=name, max_tokens=max_tokens, temperature=temperature)
                for one in questions
            ]
        if self.labels is not None:
            return [choice.label for choice in self.classify(questions, using=name)]
        prompts = [self.prompt(one, max_tokens).ids for one in questions]
        limit, form = self.limit(max_tokens), self._opened.task.form
        with self._opened.using(_NAMES[name]) as adapter:
            return generate_answers(adapter, prompts, limit, form.stop, form.ending)

    def classify(self, questions: Sequence[Question], *, using: str | None = None) -> list[Choice]:
        """The likeliest label of every text (ConfigError: the model writes text)."""
        return [
            Choice(*max(scores.items(), key=lambda item: item[1]))
            for scores in self.label_scores(questions, using=using)
        ]

    @torch.no_grad()
    def label_scores(
        self, questions: Sequence[Question], *, using: str | None = None
    ) -> list[dict[str, float]]:
        """Probability (0 to 1) of every label, for every text (ConfigError: the model writes text)."""
        name, task = _NAMES[self.name(using)], self._opened.task
        if self.labels is None:
            raise ConfigError("this model writes text, it has no labels; use generate")
        asked = [self._asked(one) for one in questions]
        examples = [Example(one, "") if isinstance(one, str) else one for one in asked]
        encoded = task.encode([replace(one, label=self.labels[0]) for one in examples])
        added = self._opened.offsets(name, encoded, prior=True)
        scores: list[dict[str, float]] = [{} for _ in asked]
        with self._opened.using(name) as adapter:
            for batch in batches(encoded.inputs):
                states = final_states(adapter, encoded, batch)
                logits = task.label_logits(states)
                logits = logits if added is None else logits + added[batch]
                for index, row in zip(batch, logits.softmax(-1).tolist(), strict=True):
                    scores[index] = dict(zip(self.labels, row, strict=True))
        return scores

    def prompt(self, question: Question, max_tokens: int | None = None) -> Prompt:
        """Token ids of what is asked, with room for the answer (DataError: nothing is asked).

        Of a conversation the oldest turns give way first, of a text its beginning.
        """
        room = self.context - self.limit(max_tokens)
        form, asked = self._opened.task.form, self._asked(question)
        said = asked if isinstance(asked, str) else asked.turns[-1].content
        if len(said) > room * _LETTERS_A_TOKEN:
            end = said[-room * _LETTERS_A_TOKEN :]
            shorter = end if isinstance(asked, str) else _ending(asked, end)
            return Prompt(form.prompt_ids(shorter, room), True)
        ids = form.prompt_ids(asked, room)
        return Prompt(ids, len(form.prompt_ids(asked, _ANY)) > len(ids))

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together, at most."""
        backbone = self._opened.backbone
        told = getattr(backbone.model.config.get_text_config(), "max_position_embeddings", None)
        return int(backbone.positions or told or self._opened.task.form.max_length)

    def _asked(self, question: Question) -> Asked:
        """What is asked, as the form takes it (DataError: nothing, no conversation, or no text)."""
        if isinstance(question, str):
            _check_text(question)
            return question
        turns = turns_of([dict(one) for one in question], "messages", "the conversation")
        if not turns or turns[-1].role in ANSWERS:
            raise DataError("the conversation does not end with what the user says")
        _check_text(turns[-1].content)
        _check_unicode("".join(turn.content for turn in turns))
        return Example(flattened(turns), "", turns=tuple(turns))

    def export(self, out: Path | str) -> Path:
        """Copy its folder to a new one (ConfigError: something is there)."""
        place = Path(out).expanduser().absolute()
        check_out(place)
        shutil.copytree(self.folder, place, dirs_exist_ok=True)
        return place

    def limit(self, max_tokens: int | None = None) -> int:
        """Tokens of an answer at most (ConfigError: none, or more than fit beside a prompt)."""
        usual = self.facts.record.form.max_answer_tokens
        limit = min(usual, self.context // 2) if max_tokens is None else max_tokens
        if not 1 <= limit < self.context:
            raise ConfigError(
                f"an answer of {limit} tokens is asked for; this model reads and writes {self.context} together, so "
                f"give 1 to {self.context - 1}"
            )
        return limit


def _check_text(text: str) -> None:
    """Refuse a text that says nothing, or that no tokenizer can read (DataError)."""
    if not text.strip():
        raise DataError("nothing is asked: the text is empty")
    _check_unicode(text)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError("the text is not valid Unicode") from error


def _ending(asked: Example, end: str) -> Example:
    """The end of a conversation's last turn, alone."""
    return Example(end, "", turns=(Turn(asked.turns[-1].role, end),))


def load(folder: Path | str) -> Model:
    """A folder that ``heterotune export`` wrote, with all its models.

    Raises
    ------
    ConfigError
        It is no such folder, or of another version.
    BackboneError
        Its base model is not here, or another one.

    """
    quieten_libraries()
    return Model(open_export(Path(folder).expanduser().absolute()))


def load_temporarily(write: Callable[[Path], Any]) -> Model:
    """The model of a folder that ``write`` makes at the path it is given; it is gone with the model."""
    place = tempfile.TemporaryDirectory(prefix="heterotune-model-")
    write(Path(place.name) / "model")
    model = load(Path(place.name) / "model")
    weakref.finalize(model, place.cleanup)
    return model
