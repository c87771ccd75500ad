"""What a server reads of ONE deployed node with the strictest settings, by messages and a configuration alone.

The node is the app's own code with its default floors; the server chooses the run's configuration, seeds and every
number of its messages. It knows the model, as everybody does, and has 2,000 texts of the same kind that the node does
not have.

plain
    a test of one record, maps that read single numbers, a step on one record: below the floors, so refused.
adaptive
    inside the floors. *Labels*: the server knows a text, and that the node holds it out; a discriminant that speaks up
    for this text alone, once for every label, and the label whose mean loss falls most is read off. *Texts*: the
    gradient of one round spans the latents of the round's examples; a candidate that lies in the span of one of a few
    rounds was trained on. No floor stops that, only noise does.

Run: ``python -m benchmarks.reliability.attacks --only node``.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client_app.app import app
from heterotune_flwr.channels.statistics.client import shared_latents
from heterotune_flwr.channels.statistics.record import LinearClassifier, Request
from heterotune_flwr.client.node import Client
from heterotune_flwr.config.compose import compose
from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.sources import label_set, training_pool
from heterotune_flwr.dema.bank import initial_tensors
from heterotune_flwr.exchange.packing import Tensors, tensor_digest
from heterotune_flwr.federation.in_process import InProcessGrid
from heterotune_flwr.flower import Message, RecordDict
from heterotune_flwr.protocol.messages import (
    DESCRIBE,
    EVALUATE,
    TRAIN,
    EvaluateReply,
    EvaluateRequest,
    Header,
    TrainReply,
    TrainRequest,
)
from heterotune_flwr.protocol.queries import DescribeReply, DescribeRequest
from heterotune_flwr.protocol.wire import RemoteError
from heterotune_flwr.schema import DataConfig, MethodConfig
from heterotune_flwr.tuning.adapters import detach_all

#: Rows of the node's file, records that are asked about, and texts among which a member is to be found.
ROWS, RECORDS, CANDIDATES = 128, 20, 2000
#: Rounds whose gradients are looked at.
ROUNDS = 12
LATENT, HIDDEN = 128, 128
LABELS = label_set(DataConfig()) or []
METHOD = MethodConfig(latent=LATENT, output=len(LABELS))
SECRET = "HETEROTUNE_ATTACKED"
Matrix = NDArray[np.float64]


@dataclass
class Node:
    """A node with the strictest settings and a server that asks it whatever it likes."""

    folder: Path
    seed: int

    def __post_init__(self) -> None:
        pool = list(dict.fromkeys(training_pool(DataConfig())))
        order = np.random.default_rng(self.seed).permutation(len(pool))
        self.rows = [pool[i] for i in order[:ROWS]]
        texts = {row.text for row in self.rows}
        others = (pool[i] for i in order[ROWS:] if pool[i].text not in texts)
        self.others = list(itertools.islice(others, CANDIDATES))
        self.folder.mkdir(parents=True)
        lines = [json.dumps({"text": row.text, "label": row.label}) + "\n" for row in self.rows]
        (self.folder / "data.jsonl").write_text("".join(lines))
        self.rng = np.random.default_rng([self.seed, 1])
        self.config = {
            "client-id": "clinic-1", "backbone": "tiny-a", "bits": "bf16", "worker": "off",
            "data": str(self.folder / "data.jsonl"), "state-dir": str(self.folder / "state"),
            "report": "counts-and-loss-only", "class-sums": "no", "answers": "no",
        }  # fmt: skip

    def ask(
        self, kind: str, content: RecordDict, overrides: str = "", config: str = "demo"
    ) -> RecordDict:
        """The node's answer to one message of a run with this configuration."""
        grid = InProcessGrid(app, [self.config], {"config": config, "overrides": overrides})
        (node,) = grid.get_node_ids()
        (reply,) = grid.send_and_receive([Message(content, node, kind, group_id="0")])
        return reply.content

    def loss(
        self, shared: LinearClassifier, maps: Tensors, overrides: str = "", seed: int = 0
    ) -> float | None:
        """Mean loss of the node's own test beside a discriminant; None where the node refuses."""
        header = Header("x", seed, METHOD, 0, compose("demo", overrides).train)
        payload = replace(Request(shared).to_payload(), codec="fp32")  # as exactly as it likes
        channels = {"statistics": payload}
        request = EvaluateRequest(header, {}, tensor_digest(maps), maps, ["personal"], channels)
        content = request.to_content("fp32", "fp32")
        try:
            metrics = EvaluateReply.from_content(self.ask(EVALUATE, content, overrides)).metrics
        except RemoteError:
            return None
        return metrics["personal_loss"]

    def update(
        self, maps: Tensors, start: Tensors, overrides: str, steps: int, round: int
    ) -> Tensors | None:
        """What one round of plain gradient descent changes; None where the node refuses."""
        train = compose("demo", overrides).train
        train = replace(train, local_steps=steps, learning_rate=0.05, optimizer="sgd")
        header = Header(f"t{round}", round, METHOD, 1, train)
        digest, expected = tensor_digest(maps), sorted(start)
        request = TrainRequest(header, start, digest, maps, expected)
        try:
            content = self.ask(TRAIN, request.to_content("fp32", "fp32"), overrides)
            return TrainReply.from_content(content).deltas
        except RemoteError:
            return None

    def latents(self, examples: Sequence[Example], maps: Tensors) -> Matrix:
        """What everybody who has the model can compute of a text."""
        grid = InProcessGrid(app, [self.config], {"config": "demo", "overrides": ""})
        client = Client.of(next(iter(grid.contexts.values())))
        adapter = client.adapter(METHOD)
        adapter.load_maps(maps, tensor_digest(maps))
        encoded = client.task().encode([Example(row.text, LABELS[0]) for row in examples])
        return np.asarray(shared_latents(adapter, encoded, False).double().cpu().numpy())

    def held_out(self) -> list[Example]:
        """Rows of the node's own test: the truth, for the score alone."""
        grid = InProcessGrid(app, [self.config], {"config": "demo", "overrides": ""})
        return Client.of(next(iter(grid.contexts.values()))).data(0).personal_test


def identity_maps() -> Tensors:
    """Maps that read a model's numbers one by one."""
    return {
        "slots.0.map.down.weight": np.eye(LATENT, HIDDEN, dtype=np.float32),
        "slots.0.map.down.bias": np.zeros(LATENT, np.float32),
        "slots.0.map.up.weight": np.zeros((HIDDEN, len(LABELS)), np.float32),
    }


def dense_maps(rng: np.random.Generator) -> Tensors:
    """Maps that look like any others, and can be undone."""
    turned, _ = np.linalg.qr(rng.standard_normal((HIDDEN, LATENT)))
    up = rng.standard_normal((HIDDEN, len(LABELS)))
    return {
        "slots.0.map.down.weight": turned.T.astype(np.float32),
        "slots.0.map.down.bias": np.zeros(LATENT, np.float32),
        "slots.0.map.up.weight": up.astype(np.float32),
    }


def environment_leaks(node: Node) -> int:
    """In how many of these ways a server reads a variable of the node's environment."""
    os.environ[SECRET] = "s3cret-of-the-node"
    variants = [
        ("demo", f"'train.optimizer=${{oc.env:{SECRET}}}'"),
        ("demo", f"train.optimizer=$''{{oc.env:{SECRET}}}"),
        ("demo", f'\'data.labels=["$" "{{oc.env:{SECRET}}}", b]\''),
        (f'yaml:train: {{optimizer: "\\x24{{oc.env:{SECRET}}}"}}', ""),
        (f'yaml:train: {{optimizer: "\\u0024{{oc.env:{SECRET}}}"}}', ""),
        (f'yaml:data: {{labels: ["\\x24{{oc.env:{SECRET}}}", b]}}\nstrategies: {{}}', ""),
    ]
    content = DescribeRequest(Header("x", 0, METHOD)).to_content()
    told = [
        str(dict(node.ask(DESCRIBE, content, words, config)["config"]))
        for config, words in variants
    ]
    return sum(os.environ[SECRET] in text for text in told)


def plain_labels(node: Node) -> int:
    """Labels read by tests of one record, whose loss says the label."""
    right = 0
    shared = LinearClassifier(
        np.zeros((len(LABELS), LATENT), np.float32),
        1000.0 * np.arange(len(LABELS), dtype=np.float32),
    )
    held = node.held_out()
    for number in range(RECORDS):
        loss = node.loss(shared, identity_maps(), "data.personal_test_examples=1", seed=number)
        if loss is not None:
            right += (
                LABELS[int(len(LABELS) - 1 - round(loss / 1000)) % len(LABELS)]
                == held[number].label
            )
    return right


def plain_texts(node: Node, shapes: dict[str, tuple[int, ...]]) -> int:
    """Texts ranked first by one step on one record, unclipped."""
    maps, start = identity_maps(), _start(shapes, node.rng)
    overrides = "train.batch_size=1 train.optimizer=sgd train.clip_norm=1e9 exchange.codec=fp32"
    found = 0
    for round in range(8):
        deltas = node.update(maps, start, overrides, 1, round)
        if deltas is None:
            continue
        read = np.linalg.svd(_stacked(deltas), full_matrices=False)[2][0]
        found += _ranks_first(node, maps, node.rows, [read[None]]) > 0
    return found


def adaptive_labels(node: Node) -> int:
    """Labels read of texts that are known to be held out, by differences of the mean loss of all that are."""
    maps = dense_maps(node.rng)
    public = node.latents(node.others, maps)
    centre = public.mean(axis=0)
    precision = np.linalg.inv(np.cov(public.T) + 1e-6 * np.eye(LATENT))
    zero = np.zeros((len(LABELS), LATENT), np.float32)
    base = node.loss(LinearClassifier(zero, zero[:, 0]), maps)
    right = 0
    records = node.held_out()[:RECORDS]
    for record, latent in zip(records, node.latents(records, maps), strict=True):
        direction = precision @ (latent - centre)
        direction *= 4.0 / float(direction @ (latent - centre))
        changes = []
        for label in range(len(LABELS)):
            weight, bias = zero.copy(), zero[:, 0].copy()
            weight[label], bias[label] = direction, -direction @ centre
            loss = node.loss(LinearClassifier(weight, bias), maps)
            if loss is None or base is None:
                return right
            changes.append(loss - base)
        right += LABELS[int(np.argmin(changes))] == record.label
    return right


def adaptive_texts(node: Node, shapes: dict[str, tuple[int, ...]]) -> int:
    """Of the texts a node trained on, those that lie in the span of a round's gradient before all 2,000 others."""
    maps, start = dense_maps(node.rng), _start(shapes, node.rng)
    overrides = "train.batch_size=8 train.optimizer=sgd train.clip_norm=10 exchange.codec=fp32 train.logit_adjustment=0"
    spans = []
    for round in range(ROUNDS):
        deltas = node.update(maps, start, overrides, 4, round)
        if deltas is not None:
            spans.append(np.linalg.svd(_stacked(deltas), full_matrices=False)[2][:32])
    held = {row.text for row in node.held_out()}
    members = [row for row in node.rows if row.text not in held][:RECORDS]
    return _ranks_first(node, maps, members, spans)


def _start(shapes: dict[str, tuple[int, ...]], rng: np.random.Generator) -> Tensors:
    """A bank whose gradient is of full rank."""
    fresh = initial_tensors(shapes, 0)
    return {
        name: value
        if ".down.weight" in name or "gate" in name
        else (0.3 * rng.standard_normal(value.shape)).astype(np.float32)
        for name, value in fresh.items()
    }


def _stacked(deltas: Tensors) -> Matrix:
    """The gradients of all experts' first layers, whose rows are sums of latents."""
    parts = [v for name, v in deltas.items() if name.endswith("down.weight")]
    return np.concatenate(parts).astype(np.float64)


def _ranks_first(
    node: Node, maps: Tensors, members: Sequence[Example], spans: Sequence[Matrix]
) -> int:
    """How many members lie nearer to one of some spans than every text that the node does not have."""
    if not spans:
        return 0

    def apart(examples: Sequence[Example]) -> Matrix:
        latents = node.latents(examples, maps)
        latents /= np.linalg.norm(latents, axis=1, keepdims=True)
        outside = [np.linalg.norm(latents - latents @ span.T @ span, axis=1) for span in spans]
        return np.min(outside, axis=0)

    return int((apart(members) < apart(node.others).min()).sum())


def attack(node: Node) -> dict[str, int]:
    """All attacks on one node."""
    described = node.ask(DESCRIBE, DescribeRequest(Header("x", 0, METHOD)).to_content())
    shapes = DescribeReply.from_content(described).shapes
    return {
        "env_leak": environment_leaks(node),
        "labels_read": plain_labels(node),
        "texts_ranked_first": plain_texts(node, shapes),
        "labels_read_adaptive": adaptive_labels(node),
        "texts_ranked_first_adaptive": adaptive_texts(node, shapes),
        "labels_asked": RECORDS,
        "texts_asked": RECORDS,
    }


def run(seeds: list[int]) -> dict[str, float | int | str]:
    """Attack one node per seed; sums over the nodes (``*_asked``: of how many)."""
    totals: dict[str, float | int | str] = {}
    with tempfile.TemporaryDirectory(prefix="heterotune-attack-") as name:
        for seed in seeds:
            found = attack(Node(Path(name) / f"node-{seed}", seed))
            totals = {key: int(totals.get(key, 0)) + value for key, value in found.items()}
    detach_all()
    return totals
