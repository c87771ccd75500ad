"""Kept records of adapters with random values: what a client has after a run, without the run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_adapters import random_values

from heterotune_flwr.alignment.views import classifier_places, views_of
from heterotune_flwr.backbones.loading import load_backbone
from heterotune_flwr.backbones.sources import BackboneSpec
from heterotune_flwr.channels.statistics.client import classifier_logits
from heterotune_flwr.channels.statistics.record import LinearClassifier
from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.template import make_form
from heterotune_flwr.export.form import data_of
from heterotune_flwr.schema import MethodConfig, TrainConfig
from heterotune_flwr.tuning.adapters import AttachedAdapter, attach
from heterotune_flwr.tuning.evaluate import evaluate
from heterotune_flwr.tuning.kept_model import (
    ALONE,
    BARE,
    FEDERATED,
    Choosing,
    Head,
    KeptBackbone,
    KeptForm,
    KeptModel,
    Measured,
)
from heterotune_flwr.tuning.states import make_rows
from heterotune_flwr.tuning.task import Task, make_task

DEMA = MethodConfig(latent=8, inner=4, experts_global=2, views=["text"])
FORM = KeptForm("Package: {text}\nSection:", "auto", None, 48, 6, None)


def maps_for(adapter: AttachedAdapter, seed: int = 5) -> dict[str, np.ndarray]:
    """Random maps of the slots and views of an adapter."""
    from heterotune_flwr.dema import read_maps

    rng = np.random.default_rng(seed)
    shapes = {name: value.shape for name, value in read_maps(adapter.model).items()}
    for view in views_of(adapter.method):
        width = view.parts * adapter.backbone.hidden
        shapes |= {f"{view.name}.map.down.weight": (adapter.method.latent, width)}
        shapes |= {f"{view.name}.map.down.bias": (adapter.method.latent,)}
    return {
        name: (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
        for name, shape in shapes.items()
    }


def a_record(
    spec: BackboneSpec,
    examples: list[Example],
    labels: list[str] | None,
    method: MethodConfig = DEMA,
    **fields: Any,
) -> tuple[KeptModel, dict[str, np.ndarray]]:
    """A record of random adapters with what they come to on ``examples``, measured as in a run; and its maps."""
    backbone = load_backbone(spec, "cpu")
    adapter = attach(backbone, method, method.output or (len(labels) if labels else method.latent))
    maps = {}
    if method.kind == "dema":
        maps = maps_for(adapter)
        adapter.load_maps(maps)
    rng = np.random.default_rng(7)
    head = prior = None
    if labels and method.kind == "dema":
        width = method.latent * len(classifier_places(method))
        weight = 0.3 * rng.standard_normal((len(labels), width))
        bias = rng.standard_normal(len(labels))
        head = Head(weight.astype(np.float32), bias.astype(np.float32))
    if labels:
        prior = np.log(rng.dirichlet(np.ones(len(labels)))).astype(np.float32).tolist()
    models = {
        FEDERATED: random_values(adapter.shapes, 1, 0.1),
        ALONE: random_values(adapter.shapes, 2, 0.1),
    }
    record = KeptModel(
        experiment="toy-heterotune-seed0",
        strategy="heterotune",
        seed=0,
        rounds=4,
        client_id="client-0000",
        type_key=backbone.type_key,
        backbone=KeptBackbone(
            spec.source, spec.bits, spec.revision, backbone.fingerprint, "bfloat16"
        ),
        method=replace(adapter.method),
        labels=labels,
        loss="labels" if labels else "tokens",
        form=FORM,
        maps_digest="",
        took=FEDERATED,
        choosing=Choosing(
            20, {BARE: Measured(2.0, 0.0, None), FEDERATED: Measured(1.5, 0.1, None)}
        ),
        tests={},
        examples={"train": 60, "choosing": 20, "personal": len(examples)},
        prior=prior,
        federated=models[FEDERATED],
        alone=models[ALONE],
        head=head,
        **fields,
    )
    task = make_task(backbone, data_of(record), labels, TrainConfig(loss=record.loss))
    tests = {name: measured(adapter, task, record, examples, name) for name in (*models, BARE)}
    return replace(record, tests=tests), maps


def measured(
    adapter: AttachedAdapter, task: Task, record: KeptModel, examples: list[Example], name: str
) -> dict[str, float]:
    """One model of a record on the client's own test."""
    values = {FEDERATED: record.federated, ALONE: record.alone}.get(name)
    if values is None:
        values = {key: np.zeros(shape, np.float32) for key, shape in adapter.shapes.items()}
    adapter.load(values)
    encoded = task.encode(examples)
    offsets = None
    if name == FEDERATED and record.head is not None:
        classifier = LinearClassifier(record.head.weight, record.head.bias)
        offsets = classifier_logits(classifier, adapter, task, encoded, cache=False)
    prior = None if name == BARE or record.prior is None else torch.tensor(record.prior)
    report = evaluate(adapter, task, make_rows(adapter, encoded, offsets=offsets), prior)
    return {f"personal_{key}": value for key, value in report.metrics.items()}


@torch.no_grad()
def attached_logits(
    record: KeptModel, maps: dict[str, np.ndarray], ids: list[list[int]], which: str = FEDERATED
) -> torch.Tensor:
    """Logits at the ends of prompts of a model as it is attached in a run, without what is added to them."""
    adapter = attached(record, maps, which)
    rows = [adapter.model(torch.tensor([line])).logits[0, -1].float() for line in ids]
    return torch.stack(rows)


def attached(record: KeptModel, maps: dict[str, np.ndarray], which: str) -> AttachedAdapter:
    """One of a record's models on its backbone, as in a run."""
    of = record.backbone
    backbone = load_backbone(BackboneSpec(of.source, of.bits, of.revision), "cpu")
    adapter = attach(backbone, record.method, record.method.output or 0)
    values = record.federated if which == FEDERATED else record.alone
    assert values is not None
    adapter.load(values)
    if maps:
        adapter.load_maps(maps)
    return adapter


def prompts_of(record: KeptModel, examples: list[Example]) -> list[list[int]]:
    """Token ids of examples' prompts."""
    of = record.backbone
    backbone = load_backbone(BackboneSpec(of.source, of.bits, of.revision), "cpu")
    form = make_form(backbone.tokenizer, data_of(record))
    return [form.prompt_ids(example.text) for example in examples]


def write_rows(path: Path, examples: list[Example]) -> Path:
    """Examples as a file of one's own."""
    import json

    rows = [{"text": example.text, "label": example.label} for example in examples]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@torch.no_grad()
def attached_label_logits(
    record: KeptModel,
    maps: dict[str, np.ndarray],
    examples: list[Example],
    which: str = FEDERATED,
) -> tuple[list[list[int]], list[int], torch.Tensor]:
    """Prompts, the labels' tokens, and a model's logits of them as a run measures, one by one."""
    adapter = attached(record, maps, which)
    task = make_task(adapter.backbone, data_of(record), record.labels, TrainConfig())
    rows = []
    for example in examples:
        encoded = task.encode([example])
        states, _, _ = make_rows(adapter, encoded, on_disk=False).rows([0])
        logits = task.label_logits(states)
        if record.head is not None and which == FEDERATED:
            classifier = LinearClassifier(record.head.weight, record.head.bias)
            logits = logits + classifier_logits(classifier, adapter, task, encoded, cache=False)
        rows.append((logits + torch.tensor(record.prior or 0.0))[0])
    assert task.trie is not None
    return task.encode(examples).inputs, task.trie.tokens, torch.stack(rows)


def a_run(
    folder: Path, records: list[tuple[KeptModel, dict[str, np.ndarray]]], take_home: bool = True
) -> Path:
    """A run directory with its clients' kept records, as after a run."""
    import json

    from heterotune_flwr.exchange.packing import tensor_digest
    from heterotune_flwr.tuning.client_state import ClientStore
    from heterotune_flwr.tuning.kept_model import kept_folder

    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"name": "toy"}))
    (folder / "config.yaml").write_text(f"server: {{take_home: {str(take_home).lower()}}}\n")
    state = folder / "state"
    state.mkdir()
    sizes = {"up_per_client_round": 1500.0, "down_per_client_round": 2500.0}
    runs = {}
    for record, maps in records:
        digest = tensor_digest(maps) if maps else ""
        if maps:
            store = ClientStore(state, record.experiment, record.client_id)
            store.save_maps(maps, digest)
        kept = replace(record, maps_digest=digest)
        kept.save(kept_folder(state, record.experiment, record.client_id))
        bytes_of = {"types": {record.type_key: sizes}}
        runs[record.strategy, record.seed] = {
            "strategy": record.strategy, "seed": record.seed, "bytes": bytes_of,
        }  # fmt: skip
    (folder / "results.json").write_text(json.dumps({"runs": list(runs.values())}))
    return folder
