"""How many tokens texts have, and how many of them fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.template import render_prompt
from heterotune_flwr.data.tokens import encode_texts
from heterotune_flwr.schema import DataConfig


@dataclass(frozen=True)
class Lengths:
    """Tokens of each text: prompt and answer together, and the answer with its end (0 where labels are one token).

    ``cut`` texts do not fit; ``shortest`` is the fewest tokens left of the prompt of one of them, and ``most`` a length
    (a multiple of 16) into which 99 of 100 texts fit.
    """

    totals: list[int]
    answers: list[int]
    cut: int
    shortest: int
    most: int


def lengths(tokenizer: Any, data: DataConfig, examples: Sequence[Example], tokens: bool) -> Lengths:
    """Measure examples as they are encoded for training; with ``tokens`` the answer counts too.

    Where answers are generated, the place that is kept free for them counts like an answer.
    """
    rendered = [render_prompt(data.prompt, example.text) for example in examples]
    prompts = [len(ids) for ids in encode_texts(tokenizer, rendered)]
    answers = [0] * len(prompts)
    if tokens:
        whole = [f"{text} {e.label}" for text, e in zip(rendered, examples, strict=True)]
        both = [len(ids) for ids in encode_texts(tokenizer, whole)]
        answers = [max(b - p, 1) + 1 for b, p in zip(both, prompts, strict=True)]
    free = data.max_answer_tokens if tokens and data.generate else 0
    totals = [p + max(a, free) for p, a in zip(prompts, answers, strict=True)]
    left = [
        max(
            data.max_length - max(a, free),
            min(p, data.max_length // 2) if a >= data.max_length else 1,
        )
        for p, a, total in zip(prompts, answers, totals, strict=True)
        if total > data.max_length
    ]
    fitting = sorted(totals)[(99 * len(totals) + 99) // 100 - 1]
    return Lengths(totals, answers, len(left), min(left, default=0), -(-fitting // 16) * 16)
