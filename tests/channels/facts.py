"""A server half of a channel opened in a run that there is not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from heterotune_flwr.channels.channel import RunFacts, ServerChannel, server_half
from heterotune_flwr.protocol.queries import DescribeReply
from heterotune_flwr.schema import AlignmentConfig, Config, MethodConfig

LABELS = ["a", "b", "c"]


def described(client_id: str, type_key: str, examples: int = 60) -> DescribeReply:
    """What a client with so many examples says of itself."""
    sizes = dict.fromkeys(("hidden", "layers", "parameters", "model_bytes", "lora16_bytes"), 8)
    return DescribeReply(
        client_id, type_key, "weights", "fp32", **sizes, train_examples=examples, personal_examples=0,
        labels=LABELS, shapes={}, code_hash="abc", words_mask=b"",
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
