"""What a run does with data of one's own, said before it starts: rows used, texts cut, answers that cannot match."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heterotune_flwr.alignment.public_texts import SHIPPED, Anchor, read_anchors
from heterotune_flwr.backbones.sources import type_key
from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.lengths import Lengths, how_they_fit
from heterotune_flwr.data.nearness import NEAR, nearness
from heterotune_flwr.data.partition import ClientData, client_examples
from heterotune_flwr.data.sources import (
    global_test,
    label_set,
    loss_kind,
    own_file,
    splits,
    training_pool,
)
from heterotune_flwr.data.template import ChatForm, make_form
from heterotune_flwr.data.virtual_clients import expand_types, owners_of
from heterotune_flwr.names import safe_text
from heterotune_flwr.schema import Config, DataConfig
from heterotune_flwr.strategies.build import strategy_config

#: Clients, and labels of one, that are told one by one.
_CLIENTS, _LABELS = 12, 8
#: Natural clients of one client that are named.
_NATURAL = 3
#: Letters of a label that are told.
_LETTERS = 40
#: What the texts of a shipped anchor set are about.
_ABOUT = {"wordnet": "the words of a dictionary"}


def own_data(config: Config, tokenizers: dict[str, Any]) -> list[str]:
    """Lines about a simulated run's own training data (none where it takes a shipped set).

    Parameters
    ----------
    config
        A configuration that passed the other checks.
    tokenizers
        By type, as a line may name them.

    """
    if config.data.train is None:
        return []
    shares, anchors = client_shares(config), read_anchors(config.alignment)
    return [
        f"{Path(config.data.train).name}: {used_line(config, shares)}",
        f"per client: {'; '.join(share_lines(config, shares))}",
        *text_notes(config, tokenizers),
        *anchors_note(config, anchors, anchors_near(config.data, anchors)),
    ]


@dataclass(frozen=True)
class ClientShare:
    """A simulated client, its model type (``smollm2@nf4``) and its own examples."""

    number: int
    type_key: str
    data: ClientData

    @property
    def examples(self) -> list[Example]:
        """All that it has."""
        return [*self.data.train, *self.data.personal_test, *self.data.choosing]

    @property
    def natural(self) -> list[str]:
        """The natural clients it holds, where the file names them."""
        return sorted({example.client for example in self.examples if example.client})

    @property
    def answers(self) -> Counter[str]:
        """How many examples each answer has."""
        return Counter(example.label for example in self.examples)

    def to_json(self) -> dict[str, Any]:
        """Numbers and names."""
        parts = ("train", "personal_test", "choosing")
        return {
            "client": self.number,
            "type": self.type_key,
            "natural": self.natural,
            **{part: len(getattr(self.data, part)) for part in parts},
            "answers": dict(self.answers.most_common()),
        }


def client_shares(config: Config) -> list[ClientShare]:
    """What every simulated client holds, for a run's first seed (DataError: a shard would be empty)."""
    types, owners, seed = expand_types(config.types), owners_of(config), config.run.seeds[0]
    return [
        ClientShare(
            number,
            type_key(entry.backbone, entry.bits, entry.revision),
            client_examples(config.data, number, len(types), seed, owners),
        )
        for number, entry in enumerate(types)
    ]


def used_line(config: Config, shares: Sequence[ClientShare]) -> str:
    """How many rows are used, and for what."""
    data = config.data
    rows, test = len(own_file(data)), len(global_test(data))
    train, personal, choosing = (
        sum(len(getattr(share.data, part)) for share in shares)
        for part in ("train", "personal_test", "choosing")
    )
    used = len({id(example) for share in shares for example in share.examples})
    whose = "kept of them for the test (data.test_share)" if splits(data) else "of the test file"
    return (
        f"{used} of {rows} rows go to {len(shares)} clients ({train} to train, {personal} for "
        f"their personal tests, {choosing} to choose what they keep); {test} rows {whose} test everybody"
    )


def share_lines(config: Config, shares: Sequence[ClientShare]) -> list[str]:
    """Every client's model type, natural clients, examples and, where answers are labels, how many of each."""
    told, closed = [], label_set(config.data) is not None
    natural = config.data.partition == "natural"
    for share in shares[:_CLIENTS]:
        text = f"{share.number} {share.type_key}{_natural(share) if natural else ''}: {len(share.examples)}"
        if closed:
            common = share.answers.most_common()
            labels = ", ".join(
                f"{safe_text(label, _LETTERS)} {count}" for label, count in common[:_LABELS]
            )
            text += f" ({labels}{', ...' if len(common) > _LABELS else ''})"
        told.append(text)
    rest = [len(share.examples) for share in shares[_CLIENTS:]]
    if rest:
        told.append(f"{len(rest)} more of {min(rest)} to {max(rest)}")
    return told


def _natural(share: ClientShare) -> str:
    names = share.natural
    if not names:
        return ""
    if len(names) > _NATURAL:
        return f" [{len(names)} natural clients]"
    return f" [{', '.join(safe_text(name, _LETTERS) for name in names)}]"


def all_rows(data: DataConfig) -> list[Example]:
    """Rows for training and for the common test."""
    return [*own_file(data), *(() if splits(data) else global_test(data))]


def scored_labels(config: Config) -> list[str] | None:
    """The labels that the loss chooses from; None: answers are written token by token."""
    labels = label_set(config.data)
    return labels if loss_kind(config.train, labels) == "labels" else None


def text_notes(
    config: Config, tokenizers: dict[str, Any], measured: dict[str, Lengths] | None = None
) -> Iterator[str]:
    """What of the texts is cut, and which answers can never match; ``measured``: lengths of :func:`all_rows`."""
    data = config.data
    yield from _forms(data, tokenizers)
    yield from how_they_fit(all_rows(data), data, scored_labels(config), tokenizers, measured)


def _forms(data: DataConfig, tokenizers: dict[str, Any]) -> Iterator[str]:
    chats = [n for n, one in tokenizers.items() if isinstance(make_form(one, data), ChatForm)]
    if chats:
        rest = [name for name in tokenizers if name not in chats]
        plain = f"; {', '.join(rest)}: as plain text" if rest else ""
        yield f"{', '.join(chats)}: asked in the model's own chat template (data.template){plain}"


def anchors_note(config: Config, anchors: Sequence[Anchor], near: float | None) -> Iterator[str]:
    """Warnings where models are aligned on texts about something else (:mod:`.data.nearness`), or off the answers."""
    kinds = {
        strategy_config(n, config.strategies[n], config).method.kind for n in config.run.compare
    }
    if "dema" not in kinds:
        return
    if label_set(config.data) is None and not any(anchor.answer for anchor in anchors):
        yield (
            "warning: the anchors have no answers, so models are compared only where answers begin, and on answers of "
            "several words sharing gains little: heterotune anchors make FILE --answers --backbone NAME"
        )
    if near is None or near >= NEAR:
        return
    chosen = config.alignment.anchors
    about = _ABOUT.get(chosen, "descriptions of Debian packages" if chosen in SHIPPED else "texts")
    yield (
        f"warning: the models are aligned on {about} ({chosen}), not on texts like yours (nearness {near:.2f}, from "
        f"{NEAR} on it is good): give public ones with alignment.anchors=FILE (heterotune anchors make)"
    )


def anchors_near(data: DataConfig, anchors: Sequence[Anchor]) -> float | None:
    """How near the anchors are to the training texts."""
    texts = [example.text for example in training_pool(data)]
    return nearness(texts, [anchor.text for anchor in anchors])
