"""What a run does with data of one's own, said before it starts: rows used, texts cut, answers that cannot match."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from heterotune_flwr.alignment.public_texts import SHIPPED
from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.lengths import how_they_fit
from heterotune_flwr.data.partition import ClientData, client_examples
from heterotune_flwr.data.sources import global_test, label_set, own_file, splits
from heterotune_flwr.data.template import ChatForm, make_form
from heterotune_flwr.data.virtual_clients import owners_of
from heterotune_flwr.names import safe_text
from heterotune_flwr.schema import Config, DataConfig
from heterotune_flwr.strategies.build import strategy_config
from heterotune_flwr.tuning.task import loss_kind

#: Clients, and labels of one, that are told one by one.
_CLIENTS, _LABELS = 12, 8
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
    return [*_used(config), *_texts(config, tokenizers), *_settings(config)]


def _used(config: Config) -> Iterator[str]:
    data, seed = config.data, config.run.seeds[0]
    total = sum(entry.clients for entry in config.types)
    clients = [
        client_examples(data, index, total, seed, owners_of(config)) for index in range(total)
    ]
    rows, test = len(own_file(data)), len(global_test(data))
    train = sum(len(client.train) for client in clients)
    personal = sum(len(client.personal_test) for client in clients)
    choosing = sum(len(client.choosing) for client in clients)
    used = len({id(example) for client in clients for example in _all(client)})
    whose = "kept of them for the test (data.test_share)" if splits(data) else "of the test file"
    yield (
        f"{Path(str(data.train)).name}: {used} of {rows} rows go to {total} clients ({train} to train, {personal} for "
        f"their personal tests, {choosing} to choose what they keep); {test} rows {whose} test everybody"
    )
    yield "per client: " + _counts(clients, closed=label_set(data) is not None)


def _counts(clients: Sequence[ClientData], closed: bool) -> str:
    told = []
    for number, client in enumerate(clients[:_CLIENTS]):
        examples = _all(client)
        text = f"{number}: {len(examples)}"
        if closed:
            common = Counter(example.label for example in examples).most_common()
            labels = ", ".join(
                f"{safe_text(label, _LETTERS)} {count}" for label, count in common[:_LABELS]
            )
            text += f" ({labels}{', ...' if len(common) > _LABELS else ''})"
        told.append(text)
    rest = [len(_all(client)) for client in clients[_CLIENTS:]]
    if rest:
        told.append(f"{len(rest)} more of {min(rest)} to {max(rest)}")
    return "; ".join(told)


def _all(client: ClientData) -> list[Example]:
    return [*client.train, *client.personal_test, *client.choosing]


def _texts(config: Config, tokenizers: dict[str, Any]) -> Iterator[str]:
    data = config.data
    rows = list(own_file(data))
    if not splits(data):
        rows += global_test(data)
    labels = label_set(data)
    chosen = labels if loss_kind(config.train, labels) == "labels" else None
    yield from _forms(data, tokenizers)
    yield from how_they_fit(rows, data, chosen, tokenizers)


def _forms(data: DataConfig, tokenizers: dict[str, Any]) -> Iterator[str]:
    chats = [n for n, one in tokenizers.items() if isinstance(make_form(one, data), ChatForm)]
    if chats:
        rest = [name for name in tokenizers if name not in chats]
        plain = f"; {', '.join(rest)}: as plain text" if rest else ""
        yield f"{', '.join(chats)}: asked in the model's own chat template (data.template){plain}"


def _settings(config: Config) -> Iterator[str]:
    """What a preset brings that is about its own data set."""
    chosen = config.alignment.anchors
    kinds = {
        strategy_config(n, config.strategies[n], config).method.kind for n in config.run.compare
    }
    if chosen in SHIPPED and "dema" in kinds:
        yield (
            f"warning: the models are aligned on {_ABOUT.get(chosen, 'descriptions of Debian packages')} ({chosen}), "
            "not on texts like yours: give public ones with alignment.anchors=FILE"
        )
