"""What a client may tell of its last test beyond means, for a run's report (no torch here).

Its label mix, which labels its models mistake, and a few of its test's examples with the models' answers. A deployed
node tells it only where its owner says so. It comes from others: :meth:`Details.from_text` believes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.jsons import parse_json
from heterotune_flwr.names import printable
from heterotune_flwr.protocol.metrics import MODELS, TESTS

#: What a request may ask for, and an owner allow: counts of labels, texts of examples and answers.
COUNTS, TEXTS = "counts", "texts"
#: Examples of a client's test with answers, letters of each text, and clients of a run that are asked for them.
SHOWN, LETTERS, CLIENTS = 3, 500, 8
#: Letters of it all.
_LONGEST = 1 << 18
#: No count is larger.
_MOST = 1 << 40

#: (right label, answered label, how often), by the labels' places.
Pairs = Sequence[tuple[int, int, int]]


@dataclass(frozen=True)
class Details:
    """What one client tells.

    Attributes
    ----------
    labels
        Training examples of every label, in the labels' order; empty: not told.
    confusion
        ``global``, ``personal`` -> ``bare``, ``alone``, ``federated`` -> pairs.
    answers
        One mapping per example: ``prompt``, ``reference``, and what each model answers, by its name.

    """

    labels: Sequence[int] = ()
    confusion: Mapping[str, Mapping[str, Pairs]] = field(default_factory=dict)
    answers: Sequence[Mapping[str, str]] = ()

    def to_text(self) -> str:
        """As it travels; empty where there is nothing to tell. Mistakes of very many labels are left out."""
        fields = {"labels": list(self.labels), "confusion": self.confusion, "answers": self.answers}
        told = {name: value for name, value in fields.items() if value}
        text = json.dumps(told, separators=(",", ":")) if told else ""
        if len(text) > _LONGEST and self.confusion:
            return replace(self, confusion={}).to_text()
        return text

    @classmethod
    def from_text(cls, text: str, labels: int, asked: Sequence[str]) -> Details:
        """Read it (ExchangeError: it is not of this form, of other than so many labels, or was not asked for)."""
        if len(text) > _LONGEST:
            raise ExchangeError(f"tells {len(text)} letters of its test, more than {_LONGEST}")
        try:
            told = parse_json(text)
        except ValueError as error:
            raise ExchangeError(f"what it tells of its test is not JSON: {error}") from error
        if not isinstance(told, dict) or not set(told) <= {"labels", "confusion", "answers"}:
            raise ExchangeError("what it tells of its test has other fields")
        counted, shown = {"labels", "confusion"} & set(told), "answers" in told
        if (counted and COUNTS not in asked) or (shown and TEXTS not in asked):
            raise ExchangeError("tells of its test what was not asked for")
        return cls(
            _label_counts(told.get("labels", []), labels),
            _confusion(told.get("confusion", {}), labels),
            _answers(told.get("answers", [])),
        )

    def to_json(self, labels: Sequence[str]) -> dict[str, Any]:
        """Return ``details`` of a client in results.json."""
        told: dict[str, Any] = {}
        if self.labels:
            told["label_mix"] = dict(zip(labels, self.labels, strict=True))
        if self.confusion:
            told["confusion"] = {
                scope: {model: _written(pairs) for model, pairs in models.items()}
                for scope, models in self.confusion.items()
            }
        if self.answers:
            told["answers"] = list(self.answers)
        return told


def _written(pairs: Pairs) -> str:
    """Pairs in one short text: ``0 2 5, 1 1 7``."""
    return ", ".join(" ".join(map(str, pair)) for pair in pairs)


def shortened(text: str) -> str:
    """A text as it is shown: of a long one its beginning."""
    return text if len(text) <= LETTERS else f"{text[: LETTERS - 4]} ..."


def _whole(value: Any, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ExchangeError("a count that it tells of its test is none")
    return value


def _label_counts(told: Any, labels: int) -> list[int]:
    if not isinstance(told, list) or len(told) not in (0, labels):
        raise ExchangeError("the label mix that it tells is of other labels")
    return [_whole(count, _MOST) for count in told]


def _confusion(told: Any, labels: int) -> dict[str, dict[str, Pairs]]:
    found: dict[str, dict[str, Pairs]] = {}
    for scope, models in _entries(told, TESTS):
        for model, pairs in _entries(models, MODELS):
            if not isinstance(pairs, list) or len(pairs) > labels**2:
                raise ExchangeError("more mistakes told of its test than there can be")
            found.setdefault(scope, {})[model] = [_pair(pair, labels - 1) for pair in pairs]
    return found


def _entries(told: Any, names: Sequence[str]) -> list[tuple[str, Any]]:
    if not isinstance(told, dict) or not set(told) <= set(names):
        raise ExchangeError(f"what it tells of its test is not by {', '.join(names)}")
    return list(told.items())


def _pair(told: Any, most: int) -> tuple[int, int, int]:
    if not isinstance(told, list) or len(told) != 3:
        raise ExchangeError("a mistake that it tells of its test is none")
    return _whole(told[0], most), _whole(told[1], most), _whole(told[2], _MOST)


def _answers(told: Any) -> list[dict[str, str]]:
    if not isinstance(told, list) or len(told) > SHOWN:
        raise ExchangeError("more answers told of its test than were asked for")
    names = ("prompt", "reference", *MODELS)
    found = []
    for answer in told:
        texts = dict(_entries(answer, names))
        if not all(isinstance(text, str) for text in texts.values()):
            raise ExchangeError("an answer that it tells of its test is no text")
        found.append({name: shortened(printable(text)) for name, text in texts.items()})
    return found
