"""The examples that an export may learn and measure by: what its clients trained on and chose by, on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heterotune_flwr.alignment.public_texts import load_anchors
from heterotune_flwr.client.identify import identify
from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.partition import ClientData
from heterotune_flwr.data.virtual_clients import expand_types
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.export.form import data_of
from heterotune_flwr.federation.resume import saved_config
from heterotune_flwr.schema import Config
from heterotune_flwr.tuning.kept_model import KeptFacts

#: Texts that a LoRA is distilled from at most, own ones first.
MOST = 2048


@dataclass(frozen=True)
class OwnExamples:
    """Examples to learn from, examples to measure by, and public texts of the run."""

    train: list[Example]
    choosing: list[Example]
    anchors: list[str]

    def lessons(self, labels: Sequence[str] | None) -> list[Example]:
        """What is distilled from; of a closed label set anchors too (their label is never looked at).

        Of open text they are where there are no own ones.
        """
        if labels is None:
            return (self.train or [_in_two(text) for text in self.anchors])[:MOST]
        public = [Example(text=text, label=labels[0]) for text in self.anchors]
        return [*self.train, *public][:MOST]


def _in_two(text: str) -> Example:
    """A public text as a question and its answer: its first half, and the second."""
    words = text.split()
    half = len(words) // 2
    return Example(text=" ".join(words[:half]), label=" ".join(words[half:]))


def own_data(run: Path, record: KeptFacts) -> tuple[Config, ClientData]:
    """A simulation's settings, and a client's own examples by them.

    Raises ConfigError, DataError: the configuration or the data are not what they were.
    """
    config = saved_config(run)
    order = len(expand_types(config.types))
    partition = record.client_id.removeprefix("client-")
    if not partition.isdigit() or int(partition) >= order:
        raise ConfigError(f"{run} has no client {record.client_id!r}")
    node = {"partition-id": int(partition), "num-partitions": order}
    return config, identify(config, node).examples(record.seed)


def of_run(run: Path, records: Sequence[KeptFacts], whole_type: bool) -> OwnExamples:
    """Those of a simulation's client (errors as of :func:`own_data`).

    A whole type's model is nobody's own: it learns from public texts alone. The clients' choosing sets measure it.
    """
    found = [own_data(run, record) for record in records]
    train = [] if whole_type else [example for _, data in found for example in data.train]
    choosing = [example for _, data in found for example in data.choosing]
    return OwnExamples(train, choosing, load_anchors(found[0][0].alignment))


def of_node(node_config: Mapping[str, Any], record: KeptFacts) -> OwnExamples:
    """Those of a deployed node, by its own settings (errors as of :meth:`..client.identity.Identity.examples`)."""
    config = Config(types=[], data=data_of(record))
    identity = identify(config, node_config)
    found = identity.examples(record.seed)
    anchors = load_anchors(identity.alignment(config)) if identity.anchors else []
    return OwnExamples(found.train, found.choosing, anchors)
