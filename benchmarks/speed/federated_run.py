"""One federated run of models with random weights, its clients in a process each: what it costs each of them."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer

from benchmarks.runner import say
from benchmarks.speed.client_processes import ClientProcesses, Served
from benchmarks.speed.shapes import SHAPES, TOKENIZER, TOYS, make_checkpoint
from heterotune_flwr.backbones.sources import type_key
from heterotune_flwr.config.compose import INLINE, compose
from heterotune_flwr.data.sources import training_pool
from heterotune_flwr.exchange.storage import atomic_write_text
from heterotune_flwr.experiment import run_strategies
from heterotune_flwr.federation.in_process import InProcessGrid
from heterotune_flwr.federation.journal import Journal
from heterotune_flwr.federation.updates import ClientUpdate
from heterotune_flwr.flower import Context, Message
from heterotune_flwr.protocol.messages import TRAIN, TrainReply
from heterotune_flwr.schema import DataConfig
from heterotune_flwr.strategies.slot_chains import SlotChains

ROUNDS = 3
#: row -> (preset, states are kept), the most important first. LoRA trains all layers and keeps none.
ROWS = {
    "heterotune.kept": ("heterotune", True),
    "fedit": ("fedit", False),
    "heterotune": ("heterotune", False),
}


@dataclass(frozen=True)
class Size:
    """How large a run is.

    ``length``: tokens of a sequence, of which an eighth is answer; ``anchors``: public texts; ``prompts``: those of
    them that a round's predictions are about; ``method``: fields of the bank besides the preset's.
    """

    shapes: Sequence[str]
    length: int
    examples: int
    steps: int
    batch: int
    anchors: int
    prompts: int
    rounds: int = ROUNDS
    method: Mapping[str, int] = field(default_factory=dict)


FULL = Size([shape for shape in SHAPES if shape.startswith("llama")], 512, 32, 8, 4, 1024, 512)
TOY = Size(list(TOYS), 64, 8, 2, 4, 400, 16, method={"latent": 32, "inner": 8})


def checkpoints(size: Size, folder: Path, device: str) -> list[Path]:
    """A folder for each shape; those that are there whole are left as they are."""
    made = []
    for shape in size.shapes:
        place = folder / shape
        if not place.exists():
            say(f"writing random weights: {shape}")
            half = place.with_suffix(".part")
            make_checkpoint(shape, half, device)
            half.rename(place)
            if device == "cuda":
                torch.cuda.empty_cache()  # the clients' processes need it
        made.append(place)
    return made


def long_examples(size: Size, folder: Path) -> dict[str, str]:
    """Files ``train`` and ``test`` whose prompts have at least ``length`` tokens, of shipped package descriptions."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    texts = [example.text for example in training_pool(DataConfig())]
    rng = random.Random(0)

    def drawn(tokens: int) -> str:
        lines: list[str] = []
        while tokens > 0:
            lines.append(rng.choice(texts))
            tokens -= len(tokenizer.encode(lines[-1]).ids)
        return "; ".join(lines)

    files = {}
    clients = len(size.shapes)
    for name, rows in {"train": clients * (2 * size.examples + 24), "test": 8}.items():
        files[name] = str(folder / f"{name}.jsonl")
        lines = [
            {"text": drawn(size.length), "label": drawn(size.length // 8)} for _ in range(rows)
        ]
        atomic_write_text(Path(files[name]), "".join(json.dumps(line) + "\n" for line in lines))
    return files


def configuration(
    row: str, bits: str, size: Size, models: Sequence[Path], files: Mapping[str, str], run: Path
) -> str:
    """Inline YAML: open text, one client of each type, as the presets have it but for sizes."""
    preset, keeps = ROWS[row]
    teaching = {"predictions": {"anchors": size.prompts, "pool": size.anchors}}
    values = {
        "groups": {
            "data": "debian_sections_text", "method": "dema", "alignment": "vocabulary", "train": "small_data",
            "exchange": "bf16", "server": "simulation",
        },
        "types": [{"backbone": str(model), "bits": bits, "clients": 1} for model in models],
        "data": {
            "name": "long", **files, "label_field": "label", "client_field": "client", "partition": "iid",
            "prompt": "{text}\nNext:", "max_length": size.length, "examples_per_client": size.examples,
            "personal_test_examples": 2, "global_test_examples": 4, "generate": 0,
        },
        "method": dict(size.method),
        "alignment": {"count": size.anchors, "symbols": 1024, "quality_threshold": 0.0},
        "train": {
            "local_steps": size.steps, "batch_size": size.batch, "cache_states": keeps,
            "gradient_checkpointing": True,
        },
        "server": {
            "rounds": size.rounds, "evaluate_every": 0, "evaluate_before": False, "take_home": False,
            "keep_checkpoints": 0,
        },
        "strategies": [{preset: teaching if preset == "heterotune" else {}}],
        "run": {"name": "gpu", "dir": str(run), "compare": [preset]},
    }  # fmt: skip
    return INLINE + yaml.safe_dump(values, sort_keys=False)


class Recorded:
    """Clients whose replies to the first round's training are kept."""

    def __init__(self, clients: ClientProcesses) -> None:
        self._clients = clients
        self.replies: list[TrainReply] = []

    def __call__(self, message: Message, context: Context) -> Message:
        """Pass a message on."""
        reply = self._clients(message, context)
        if message.metadata.message_type == TRAIN and message.metadata.group_id == "1":
            self.replies.append(TrainReply.from_content(reply.content))
        return reply


def measure(config: str, clients: ClientProcesses) -> tuple[dict[str, Any], list[TrainReply]]:
    """A run's costs by shape, and what its clients sent in the first round."""
    composed = compose(config)
    count = len(composed.types)
    nodes = [{"partition-id": index, "num-partitions": count} for index in range(count)]
    recorded = Recorded(clients)
    grid = InProcessGrid(recorded, nodes, {"config": config, "overrides": ""})
    (run,) = run_strategies(grid, composed, Journal(Path(str(composed.run.dir))), "gpu")["runs"]
    found = {}
    for number, entry in enumerate(composed.types):
        own = [one for one in clients.served if one.client == number]
        counted = run["bytes"]["types"][type_key(entry.backbone, entry.bits)]
        found[Path(entry.backbone).name] = costs(own, counted)
    return found, recorded.replies


def costs(served: Sequence[Served], counted: Mapping[str, float]) -> dict[str, Any]:
    """Of one client: seconds of every client-round, peak GB in them, kB each way a round."""
    trained = [one for one in served if one.message_type == TRAIN]
    return {
        "seconds": [round(one.seconds, 3) for one in trained],
        "peak_gb": round(max(one.peak_gb for one in trained), 3),
        "kb_down": round(counted["down_per_client_round"] / 1e3, 1),
        "kb_up": round(counted["up_per_client_round"] / 1e3, 1),
    }


def aggregation_difference(replies: Sequence[TrainReply], device: str) -> float:
    """Largest difference of the server's step, which a CPU takes, from its formula on ``device``, over its length.

    The formula is docs/method.md's, in float64: no client longer than the (lower) median, means over a type's clients
    by examples, the mean of the types.
    """
    weighed = ("examples", "steps", "learning_rate")
    updates = [
        ClientUpdate(r.client_id, r.type_key, **{n: r.metrics[n] for n in weighed}, deltas=r.deltas)
        for r in replies
    ]
    step = SlotChains(None).step(1, updates)
    names = sorted(step)  # all of one slot, the last
    sent = torch.stack([flat(u.deltas, names) / u.path_length for u in updates]).to(device)
    examples = torch.tensor([u.examples for u in updates], dtype=torch.float64, device=device)
    lengths = sent.norm(dim=1)
    moving = lengths[lengths > 0].sort().values
    sent = sent * (moving[(len(moving) - 1) // 2] / lengths.clamp(min=1e-300)).clamp(max=1)[:, None]
    types = sorted({u.type_key for u in updates})
    means = []
    for key in types:
        own = [number for number, update in enumerate(updates) if update.type_key == key]
        means.append((examples[own] / examples[own].sum()) @ sent[own])
    paths = torch.tensor([u.path_length for u in updates], dtype=torch.float64, device=device)
    expected = torch.stack(means).mean(dim=0) * (paths @ examples) / examples.sum()
    found = flat(step, names).to(device)
    return float((found - expected).abs().max() / expected.norm())


def flat(tensors: Mapping[str, Any], names: Sequence[str]) -> torch.Tensor:
    """Some tensors as one vector in float64, in the given order."""
    parts = [np.asarray(tensors[name], dtype=np.float64).reshape(-1) for name in names]
    return torch.from_numpy(np.concatenate(parts))
