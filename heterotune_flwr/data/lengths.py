"""How many tokens texts have, and how many of them fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.label_trie import make_trie
from heterotune_flwr.data.template import make_form
from heterotune_flwr.names import safe_text
from heterotune_flwr.schema import DataConfig


@dataclass(frozen=True)
class Lengths:
    """Tokens of each text: prompt and answer together, and the answer with its end (of labels: what is read of them).

    ``cut`` texts do not fit; ``shortest`` is the fewest tokens left of the prompt of one of them, and ``most`` a length
    (a multiple of 16) into which 99 of 100 texts fit. ``stop``: before which text a generated answer ends.
    """

    totals: list[int]
    answers: list[int]
    cut: int
    shortest: int
    most: int
    stop: str | None


def lengths(
    tokenizer: Any, data: DataConfig, examples: Sequence[Example], labels: Sequence[str] | None
) -> Lengths:
    """Measure examples as they are encoded for training; the answer counts where it is written token by token.

    Of ``labels`` (None: there are none) the longest part that is read has room behind every prompt. Where answers are
    generated, the place that is kept free for them counts like an answer.
    """
    form = make_form(tokenizer, data)
    prompts, answers = form.sizes(examples)
    if labels is not None:
        answers = [make_trie(form, labels).longest] * len(prompts)
    free = data.max_answer_tokens if labels is None and data.generate else 0
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
    return Lengths(
        totals, answers, len(left), min(left, default=0), -(-fitting // 16) * 16, form.stop
    )


def how_they_fit(
    rows: Sequence[Example],
    data: DataConfig,
    labels: Sequence[str] | None,
    tokenizers: dict[str, Any],
    measured: dict[str, Lengths] | None = None,
) -> Iterator[str]:
    """Say what is cut, and which answers can never match, for the type that fits the texts least.

    ``labels``: what the loss chooses from; None: answers are written token by token. ``measured``: :func:`lengths` of
    these rows by type, where somebody has them.
    """
    found = measured or {name: lengths(one, data, rows, labels) for name, one in tokenizers.items()}
    name = max(found, key=lambda one: found[one].cut)
    worst = found[name]
    yield _cut(worst, name, data)
    if labels is not None:
        yield from _alike(labels, data, tokenizers)
        return
    yield from _over_long(rows, worst, name, data)
    if data.generate:
        yield from _unmatched(rows, max(found.values(), key=lambda one: sum(one.answers)), data)


def _alike(labels: Sequence[str], data: DataConfig, tokenizers: dict[str, Any]) -> Iterator[str]:
    """Labels that may be meant to be one, and what it costs that some share their first tokens."""
    first: dict[str, str] = {}
    pairs = [(one, name) for name in labels if (one := first.setdefault(name.casefold(), name)) != name]  # fmt: skip
    if pairs:
        one, other = (safe_text(name, 40) for name in pairs[0])
        yield (
            f"warning: labels {one!r} and {other!r} differ in case alone ({len(pairs)} such): write them alike if they "
            "mean the same"
        )
    reads = {n: len(make_trie(make_form(t, data), labels).reads) for n, t in tokenizers.items()}
    name = max(reads, key=lambda one: reads[one])
    if reads[name] > 1:
        yield f"labels share their first tokens: every text is read {reads[name]} times ({name})"


def _cut(of: Lengths, name: str, data: DataConfig) -> str:
    if not of.cut:
        return f"no text is cut: the longest has {max(of.totals)} of data.max_length={data.max_length} tokens ({name})"
    mend = ""
    if of.most > data.max_length:
        mend = f"; 99 of 100 would fit whole with data.max_length={of.most}"
    return (
        f"warning: {100 * of.cut / len(of.totals):.3g} % of the prompts are cut to fit data.max_length="
        f"{data.max_length} tokens ({name}), one to its last {of.shortest}{mend}"
    )


def _over_long(rows: Sequence[Example], of: Lengths, name: str, data: DataConfig) -> Iterator[str]:
    found = [n for n, answer in enumerate(of.answers) if answer >= data.max_length]
    if found:
        first = found[0]
        yield (
            f"warning: {len(found)} of {len(rows)} answers leave no room for a prompt and are cut, the first in row "
            f"{rows[first].row or first + 1}: {of.answers[first]} tokens ({name}), data.max_length is {data.max_length}"
        )


def _unmatched(rows: Sequence[Example], of: Lengths, data: DataConfig) -> Iterator[str]:
    """Right answers that no generated one can equal."""
    if of.stop is not None:
        held = sum(all(of.stop in answer for answer in row.answers) for row in rows)
        if held:
            yield (
                f"warning: {held} of {len(rows)} right answers hold data.stop ({of.stop!r}), before which every "
                "generated answer ends: they can never match; set data.stop=null or another text"
            )
    longer = sum(answer - 1 > data.max_answer_tokens for answer in of.answers)
    if longer:
        yield (
            f"warning: {longer} of {len(rows)} right answers have more than data.max_answer_tokens="
            f"{data.max_answer_tokens} tokens (up to {max(of.answers) - 1}): they can never match"
        )
