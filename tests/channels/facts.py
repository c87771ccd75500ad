"""What channels' tests are made of: a server half at work in a run that there is not, predictions, told classes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from heterotune_flwr.channels.channel import RunFacts, ServerChannel, server_half
from heterotune_flwr.channels.statistics.class_pool import Classes
from heterotune_flwr.channels.statistics.record import ClassSums
from heterotune_flwr.protocol.queries import DescribeReply
from heterotune_flwr.schema import AlignmentConfig, Config, MethodConfig

LABELS = ["a", "b", "c"]


def described(client_id: str, type_key: str, examples: int = 60) -> DescribeReply:
    """What a client with so many examples says of itself."""
    sizes = dict.fromkeys(("hidden", "layers", "parameters", "model_bytes", "lora16_bytes"), 8)
    return DescribeReply(
        client_id, type_key, "weights", "fp32", **sizes, train_examples=examples, personal_examples=0,
        labels=LABELS, shapes={}, code_hash="abc",
    )  # fmt: skip


def run_facts(
    types: Mapping[str, str] | None = None,
    anchors: Path | None = None,
    weighting: float = 0.0,
    **facts: Any,
) -> RunFacts:
    """``types``: every client's model type; ``anchors``: a file with public texts; ``facts``: as :class:`RunFacts`."""
    alignment = AlignmentConfig(anchors=str(anchors or ""), weighting=weighting)
    clients = {cid: described(cid, key) for cid, key in (types or {"c0": "a"}).items()}
    given: dict[str, Any] = {"labels": LABELS, "clients": clients, **facts}
    return RunFacts(Config(alignment=alignment), MethodConfig(), **given)


def opened(name: str, facts: RunFacts, **options: Any) -> Any:
    """A channel's server half at work in a run."""
    half = server_half(name)
    channel: ServerChannel = half(half.read(options))
    assert channel.open(facts) is None
    return channel


def texts(path: Path, count: int) -> Path:
    """A file with so many public texts."""
    path.write_text("".join(f"text {n}\n" for n in range(count)))
    return path


def probabilities(rng, n=20, classes=3, sharpness=2.0):
    logits = sharpness * rng.normal(size=(n, classes))
    return (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).astype(np.float32)


#: HeteroTune with nothing but its bank and class statistics.
PLAIN = {
    "_component_": "heterotune_flwr.strategies.heterotune.HeteroTune",
    "statistics": {"weight": 0.5},
}


def drawn(seed, shift=0, count=60, labels=3, latents=5):
    """Classes of examples around centres that everybody shares; ``shift``: each is called by another's name."""
    rng = np.random.default_rng(seed)
    own = rng.integers(0, labels, size=count)
    z = 3.0 + 2.0 * np.eye(labels, latents)[own] + rng.normal(size=(count, latents))
    called = (own + shift) % labels
    sums = np.stack([z[called == label].sum(axis=0) for label in range(labels)])
    return Classes(np.bincount(called, minlength=labels).astype(float), sums)


def payload(counts, sums):
    return ClassSums(np.asarray(counts, np.float32), np.asarray(sums, np.float32)).to_payload()


def facts_of(types):
    """Clients that are called as their types."""
    return run_facts({key: key for key in types}, spreads=np.ones(5), usual_examples=60.0)


def judged(classes, **options):
    """The server's half after one client of each type has told these, and what it made of them."""
    server = opened("statistics", facts_of([*classes, "guest"]), **options)
    told = {key: payload(c.counts, c.sums) for key, c in classes.items()}
    return server, server.aggregate(1, told, [])


def told(counts=(3.0, 0.0, 2.0), latent=4, each=1.0):
    counts = np.array(counts, np.float32)
    sums = np.full((len(counts), latent), each, np.float32) * counts[:, None]
    return ClassSums(counts, sums)
