"""Frozen last-slot states for the laboratory: computed once by the product's own code, kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.alignment.public_texts import SHIPPED, anchor_digest, load_anchors
from heterotune_flwr.backbones.assets import cache_dir
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
    from heterotune_flwr.backbones.sources import BackboneSpec, fingerprint, resolve_source

    source, bits = parse(spec)
    backbone_spec = BackboneSpec(source, bits)
    identity = fingerprint(resolve_source(source), bits)
    wanted = {name: load_anchors(AlignmentConfig(anchors=name, count=ANCHORS)) for name in anchors}
    kept: dict[str, Array] = {}
    for name, rows in {**wanted, "pool": task.pool, "test": task.test}.items():
        parts = [VERSION, identity, anchor_digest(rows), task.data.prompt, task.data.max_length]
        path = _cache_file(name, parts)
        if not path.exists():
            _compute_states(backbone_spec, rows, task.data, path, name)
        kept[name] = load_tensors(path)["states"]
    path = _cache_file("labels", [VERSION, identity, task.labels, task.data.prompt])
    if not path.exists():
        _compute_head(backbone_spec, task, path)
    states = {name: kept[name] for name in anchors}
    head = load_tensors(path)["labels"]
    return TypeStates(backbone_spec.type_key, states, kept["pool"], kept["test"], head)


def _compute_states(spec: Any, texts: list[str], data: DataConfig, path: Path, name: str) -> None:
    import torch

    from heterotune_flwr.alignment.factors import collect_states
    from heterotune_flwr.backbones.loading import load_backbone

    torch.set_num_threads(1)
    print(f"{spec.type_key}: computing the states of {len(texts)} texts ({name})", flush=True)
    states = collect_states(load_backbone(spec), texts, data, 1)[0]
    save_tensors(path, {"states": states})


def _compute_head(spec: Any, task: Task, path: Path) -> None:
    from heterotune_flwr.alignment.factors import label_rows
    from heterotune_flwr.backbones.loading import load_backbone
    from heterotune_flwr.data.label_trie import make_trie
    from heterotune_flwr.data.template import make_form

    backbone = load_backbone(spec)
    trie = make_trie(make_form(backbone.tokenizer, task.data), task.labels)
    if trie.longest:
        raise SystemExit(
            f"{spec.type_key}: the laboratory reads a text once, so labels must differ in their first token"
        )
    save_tensors(path, {"labels": label_rows(backbone, trie).astype(np.float32)})
