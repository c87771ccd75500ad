"""Frozen last-slot states for the laboratory: computed once by the product's own code, kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.alignment.public_texts import (
    SHIPPED,
    Anchor,
    anchor_digest,
    load_anchors,
)
from heterotune_flwr.backbones.assets import cache_dir
from heterotune_flwr.backbones.views import VIEWS
from heterotune_flwr.data.sources import global_test, label_set, training_pool
from heterotune_flwr.exchange.storage import load_tensors, save_tensors
from heterotune_flwr.schema import AlignmentConfig, DataConfig

Array = NDArray[np.float32]
ANCHORS = 6000
#: The demonstration's: 96 examples a client, Dirichlet(0.3).
DATA = DataConfig(examples_per_client=96, prompt="Package: {text}\nSection:", template="plain")
#: Counts up when what is kept changes.
VERSION = 1


@dataclass(frozen=True)
class Task:
    """The task's texts and labels (as indices), the same for every type."""

    data: DataConfig
    labels: list[str]
    pool: list[str]
    pool_y: NDArray[np.int64]
    test: list[str]
    test_y: NDArray[np.int64]


@dataclass(frozen=True)
class TypeStates:
    """What the laboratory knows of one type.

    Attributes
    ----------
    name
        The type's key.
    anchors
        Anchor set -> states (n x d) at the answer position.
    pool, test
        States of the task's texts.
    label_rows
        Unembedding rows of the label words (C x d).

    """

    name: str
    anchors: dict[str, Array]
    pool: Array
    test: Array
    label_rows: Array


def load_task(data: DataConfig = DATA) -> Task:
    """The embedded 16-way classification task."""
    labels = label_set(data)
    assert labels is not None
    pool, test = training_pool(data), global_test(data)
    index = {label: i for i, label in enumerate(labels)}

    def targets(examples: Sequence[Any]) -> NDArray[np.int64]:
        return np.array([index[e.label] for e in examples])

    return Task(
        data, labels, [e.text for e in pool], targets(pool), [e.text for e in test], targets(test)
    )


def parse(spec: str) -> tuple[str, str]:
    """Source and bits of ``source[@bits]``."""
    source, _, bits = spec.rpartition("@")
    return (source, bits) if source else (bits, "bf16")


def _cache_file(kind: str, parts: object) -> Path:
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
    return cache_dir() / "probe" / f"{kind}-{digest}.safetensors"


def load_type(spec: str, task: Task, anchors: Sequence[str] = SHIPPED) -> TypeStates:
    """States of one type, ``source[@bits]``, and of some anchor sets; minutes the first time, then from the cache."""
    wanted = {name: load_anchors(AlignmentConfig(anchors=name, count=ANCHORS)) for name in anchors}
    kept = kept_states(spec, {**wanted, "pool": task.pool, "test": task.test}, task.data)
    states = {name: kept[name] for name in anchors}
    rows = kept_label_rows(spec, task.labels, task.data)
    return TypeStates(type_key(spec), states, kept["pool"], kept["test"], rows)


def type_key(spec: str) -> str:
    """Key of the type ``source[@bits]``."""
    from heterotune_flwr.backbones.sources import BackboneSpec

    return BackboneSpec(*parse(spec)).type_key


def _identity(spec: str) -> str:
    from heterotune_flwr.backbones.sources import fingerprint, resolve_source

    source, bits = parse(spec)
    return fingerprint(resolve_source(source), bits)


def kept_states(
    spec: str, parts: Mapping[str, list[str]], data: DataConfig, view: str = ""
) -> dict[str, Array]:
    """States of some texts, by part: where the answer is read (n x d), or a ``view`` of the whole text (n x parts d).

    Computed the first time, then from the cache.
    """
    identity, kept = _identity(spec), {}
    for name, rows in parts.items():
        told = [VERSION, identity, anchor_digest(rows), data.prompt, data.max_length]
        path = _cache_file(name, [*told, view, VIEWS[view].version] if view else told)
        if not path.exists():
            _compute_states(spec, rows, data, path, name, view)
        kept[name] = load_tensors(path)["states"]
    return kept


def kept_label_rows(spec: str, labels: list[str], data: DataConfig) -> Array:
    """Unembedding rows of the label words (C x d), computed the first time."""
    path = _cache_file("labels", [VERSION, _identity(spec), labels, data.prompt])
    if not path.exists():
        _compute_head(spec, labels, data, path)
    return load_tensors(path)["labels"]


def _loaded(spec: str) -> Any:
    from heterotune_flwr.backbones.loading import load_backbone
    from heterotune_flwr.backbones.sources import BackboneSpec

    return load_backbone(BackboneSpec(*parse(spec)))


def _compute_states(
    spec: str, texts: list[str], data: DataConfig, path: Path, name: str, view: str
) -> None:
    import torch

    from heterotune_flwr.alignment.factors import collect_states, collect_view

    torch.set_num_threads(1)
    print(
        f"{spec}: computing the {view or 'last'} states of {len(texts)} texts ({name})", flush=True
    )
    backbone = _loaded(spec)
    seen = collect_view(VIEWS[view], backbone, texts, data) if view else None
    places = [Anchor(text) for text in texts]
    states = collect_states(backbone, places, data, 1)[0] if seen is None else seen
    save_tensors(path, {"states": states})


def _compute_head(spec: str, labels: list[str], data: DataConfig, path: Path) -> None:
    from heterotune_flwr.alignment.factors import label_rows
    from heterotune_flwr.data.label_trie import make_trie
    from heterotune_flwr.data.template import make_form

    backbone = _loaded(spec)
    trie = make_trie(make_form(backbone.tokenizer, data), labels)
    if trie.longest:
        raise SystemExit(
            f"{spec}: the laboratory reads a text once, so labels must differ in their first token"
        )
    save_tensors(path, {"labels": label_rows(backbone, trie).astype(np.float32)})
