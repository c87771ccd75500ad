"""What is proposed for a user's own data: the task, its prompt, who owns what, how long, how many tokens."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from heterotune_flwr.alignment.public_texts import load_anchors
from heterotune_flwr.backbones.bits import check_bits
from heterotune_flwr.backbones.sources import (
    EMBEDDED,
    FETCHABLE,
    describe_source,
    is_present,
    resolve_source,
)
from heterotune_flwr.backbones.tokenizer import load_tokenizer
from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.layouts import Layout
from heterotune_flwr.data.lengths import lengths
from heterotune_flwr.data.nearness import nearness
from heterotune_flwr.data.partition import client_examples
from heterotune_flwr.data.sources import read_examples
from heterotune_flwr.errors import BackboneError, ConfigError, DataError
from heterotune_flwr.new.table import Table
from heterotune_flwr.schema import BITS, AlignmentConfig, DataConfig

#: One after the other, the larger at fewer bits.
BACKBONES = ("tiny-a@bf16", "tiny-b@int8", "tiny-c@nf4")
#: Public texts where nobody gives some.
ANCHORS = ("wordnet", "debian-other")
_DATA = DataConfig()
#: More different answers than this are no labels, whatever a run may be told.
_MOST_LABELS = 256
#: Rows that a client is worth having with, and how many clients are proposed at most.
_FEWEST_ROWS, _MOST_CLIENTS = 8, 12
#: Tokens: none cut up to the first, few up to the second; of an answer that is generated.
_WHOLE, _LONGEST, _LONGEST_ANSWER, _SHORTEST = 512, 1024, 128, 32
#: Rows whose tokens are counted.
_MEASURED = 2000


@dataclass(frozen=True)
class Wishes:
    """What its user says of a run; None: what is proposed."""

    data: Path
    text: str | None = None
    label: str | None = None
    client: str | None = None
    clients: int | None = None
    backbones: Sequence[str] = ()
    anchors: str | None = None
    test: Path | None = None


@dataclass(frozen=True)
class Plan:
    """A run for somebody's data.

    Attributes
    ----------
    data
        Settings of ``data``, those that differ from the defaults.
    labels
        How often each answer occurs; None: open text.
    types
        Backbone, bits and clients.
    rows, natural
        Of the training file; natural clients in it, 0 where nothing names them.
    longest
        Tokens of the longest example.
    each
        Rows that a client trains on, about.
    anchors, texts
        Public texts, and how many there are.
    local_steps, rounds
        Per round, and in all.

    """

    data: DataConfig
    labels: Counter[str] | None
    types: list[tuple[str, str, int]]
    rows: int
    natural: int
    longest: int
    each: int
    anchors: str
    texts: int
    local_steps: int
    rounds: int

    @property
    def clients(self) -> int:
        """Clients of all types."""
        return sum(count for _, _, count in self.types)

    @property
    def latent(self) -> int:
        """Width of the shared latents: so many can be told apart on the public texts."""
        return min(128, self.texts // 4)

    @property
    def to_fetch(self) -> list[str]:
        """Backbones that ``heterotune fetch`` has to bring first."""
        return [name for name, _, _ in self.types if name in FETCHABLE and not is_present(name)]


def plan(wishes: Wishes, table: Table) -> Plan:
    """Propose a run.

    Raises DataError: the file cannot be read with these columns, or is too small; BackboneError: an unknown backbone;
    ConfigError: more backbones than clients.
    """
    backbones = [parse_backbone(word) for word in wishes.backbones or BACKBONES]
    data = _columns(wishes, table)
    examples = read_examples(wishes.data, data)
    if wishes.test is not None:
        read_examples(wishes.test, data)
    labels = _labels(examples, table.layout)
    natural = Counter(e.client for e in examples if e.client) if wishes.client else Counter[str]()
    if wishes.client and not wishes.backbones:
        backbones = backbones[: max(len(natural), 1)]
    usable = sum(size >= _FEWEST_ROWS for size in natural.values())
    count = _client_count(wishes, len(backbones), len(examples), usable)
    data = _task(_partition(data, wishes, usable, count), labels, table, wishes)
    data, longest = _sized(data, labels, examples, [name for name, _ in backbones])
    anchors = wishes.anchors or nearest_anchors(examples)
    texts = len(load_anchors(AlignmentConfig(anchors=anchors)))
    each = round(sum(len(client_examples(data, i, count, 0).train) for i in range(count)) / count)
    steps = math.ceil((2 if labels else 1) * each / 16)
    return Plan(
        data=data,
        labels=labels,
        types=[
            (name, bits, count // len(backbones) + (place < count % len(backbones)))
            for place, (name, bits) in enumerate(backbones)
        ],
        rows=len(examples),
        natural=usable,
        longest=longest,
        each=each,
        anchors=anchors,
        texts=texts,
        local_steps=min(max(steps, 6), 24),
        rounds=20 if labels else 10,
    )


def parse_backbone(word: str) -> tuple[str, str]:
    """Name and bits of ``NAME@BITS`` (bf16 where only the name is given); BackboneError: no such backbone or bits."""
    name, at, bits = word.rpartition("@")
    name, bits = (name, bits) if at else (bits, "bf16")
    if bits not in BITS:
        raise BackboneError(f"--backbone {word}: write NAME@BITS with bits of {', '.join(BITS)}")
    if name not in FETCHABLE:
        resolve_source(name, config_only=True)
        describe_source(name)
    check_bits(bits)
    return name, bits


def nearest_anchors(examples: Sequence[Example]) -> str:
    """The shipped set whose words are most like the data's; a dictionary where that cannot be told."""
    texts = [example.text for example in examples]
    near = {n: nearness(texts, load_anchors(AlignmentConfig(anchors=n))) or 0.0 for n in ANCHORS}
    return max(ANCHORS, key=lambda name: near[name])


def _columns(wishes: Wishes, table: Table) -> DataConfig:
    """Settings that say which columns are meant, and where they are not the usual ones."""
    data = replace(_DATA, name="own", train=str(wishes.data), max_labels=_MOST_LABELS)
    if wishes.text is not None:
        data = replace(data, text_field=table.check(wishes.text, "--text"))
    if wishes.label is not None:
        data = replace(data, label_field=table.check(wishes.label, "--label"))
    if wishes.client is not None:
        data = replace(data, client_field=table.check(wishes.client, "--client-column"))
    return replace(data, test=None if wishes.test is None else str(wishes.test))


def _labels(examples: Sequence[Example], layout: Layout | None) -> Counter[str] | None:
    """How often every answer occurs, where they are labels: few that come again and again; None: open text."""
    found = Counter(example.label for example in examples)
    if len(found) < 2:
        raise DataError("every example has the same answer: there is nothing to learn")
    most = _DATA.max_labels if layout else _MOST_LABELS
    few = len(found) <= most and len(found) * 4 <= len(examples)
    short = max(len(label) for label in found) <= 60 and not any("\n" in label for label in found)
    return found if few and short else None


def _client_count(wishes: Wishes, types: int, rows: int, natural: int) -> int:
    """How many clients there are, at least one a type."""
    if wishes.client is not None and natural < 2:
        raise DataError(
            f"--client-column {wishes.client}: {natural} of its values have {_FEWEST_ROWS} rows or more; two clients "
            "at least are needed: leave it out, and rows are dealt to clients by chance"
        )
    own = wishes.client is not None
    most = natural if own else rows // _FEWEST_ROWS
    proposed = (
        min(most, _MOST_CLIENTS)
        if own
        else min(most, max(rows // (4 * _FEWEST_ROWS), types), 2 * types)
    )
    count = proposed if wishes.clients is None else wishes.clients
    whose = f"{natural} natural clients" if own else f"{rows} rows"
    if count > most:
        raise DataError(f"--clients {count}: {whose} are enough for {most} clients")
    if count < types:
        raise ConfigError(
            f"{types} backbones need a client each, and {whose} are enough for {most} clients"
            if wishes.clients is None
            else f"--clients {count}: {types} backbones need a client each"
        )
    return count


def _partition(data: DataConfig, wishes: Wishes, natural: int, count: int) -> DataConfig:
    if wishes.client is None:
        return data
    return replace(data, partition="natural", groups_per_client=max(natural // count, 1))


def _task(
    data: DataConfig, labels: Counter[str] | None, table: Table, wishes: Wishes
) -> DataConfig:
    """The prompt, and whether answers are labels."""
    if labels is None:
        prompt = (
            _DATA.prompt
            if table.layout
            else f"{_title(data.text_field)}: {{text}}\n{_title(data.label_field)}:"
        )
        return replace(data, max_labels=0, generate=32, prompt=prompt)
    named = "Answer" if table.layout else _title(wishes.label or data.label_field)
    asked = "{text}" if table.layout else f"{_title(data.text_field)}: {{text}}"
    most = max(_DATA.max_labels, len(labels))
    return replace(data, max_labels=most, prompt=f"{asked}\n{named}:")


def _title(column: str) -> str:
    """``Review text`` of ``review_text``."""
    words = " ".join(re.split(r"[\W_]+", column)).strip() or "Text"
    return words[:1].upper() + words[1:]


def _sized(
    data: DataConfig,
    labels: Iterable[str] | None,
    examples: Sequence[Example],
    names: Sequence[str],
) -> tuple[DataConfig, int]:
    """Lengths into which examples fit, and the tokens of the longest."""
    names_of = sorted(labels) if labels is not None else None
    measured = examples[:_MEASURED]
    tokenizers = _tokenizers(names)
    if names_of is None:
        bare = replace(data, generate=0)
        most = max(max(lengths(t, bare, measured, None).answers) for t in tokenizers) - 1
        stop = None if any("\n" in example.label for example in examples) else data.stop
        data = replace(data, stop=stop, max_answer_tokens=min(max(most, 8), _LONGEST_ANSWER))
    found = [lengths(t, data, measured, names_of) for t in tokenizers]
    longest = max(max(of.totals) for of in found)
    wanted = longest if longest <= _WHOLE else max(_WHOLE, *(of.most for of in found))
    fitting = min(max(-(-wanted // 16) * 16, _SHORTEST), _LONGEST)
    return replace(data, max_length=fitting), longest


def _tokenizers(names: Sequence[str]) -> list[Any]:
    """Those of the backbones that are here; of one to be fetched the smallest stands in, which needs more tokens."""
    found = {}
    for name in names:
        known = name if name not in FETCHABLE or is_present(name) else EMBEDDED[0]
        shape = describe_source(known)
        found[known] = load_tokenizer(known, resolve_source(known), shape.vocabulary)
    return list(found.values())
