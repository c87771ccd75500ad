"""The same local training as a client's, in a bare PyTorch loop: no Flower, no product code around it.

Two loops are timed: on kept final states (what a client of the last-slot method does from its second round on) and
with the backbone's forward pass in every step (what a loop without kept states would do).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heterotune_flwr.backbones.bits import resolve_spec
from heterotune_flwr.backbones.loading import load_backbone
from heterotune_flwr.client.identity import expand_types
from heterotune_flwr.config.compose import compose
from heterotune_flwr.data.partition import client_examples
from heterotune_flwr.data.sources import label_set
from heterotune_flwr.data.template import encode_prompt, label_tokens
from heterotune_flwr.schema import Config


class _Bank(nn.Module):
    """E experts r -> q -> C with a dense gate."""

    def __init__(self, config: Config, labels: int) -> None:
        super().__init__()
        method = config.method
        count = method.experts_global
        self.downs = nn.ModuleList(nn.Linear(method.latent, method.inner) for _ in range(count))
        self.ups = nn.ModuleList(nn.Linear(method.inner, labels, bias=False) for _ in range(count))
        self.gate = nn.Linear(method.latent, count)

    def forward(self, z: Tensor) -> Tensor:
        weights = torch.softmax(self.gate(z), dim=-1)
        mixed = torch.zeros(len(z), self.ups[0].out_features)
        for index, (down, up) in enumerate(zip(self.downs, self.ups, strict=True)):
            mixed = mixed + weights[:, index : index + 1] * up(F.silu(down(z)))
        return mixed


def _client_seconds(config: Config, partition: int, total: int, cached: bool) -> float:
    """Seconds of one client's local steps."""
    entry = expand_types(config.types)[partition]
    backbone = load_backbone(
        resolve_spec(entry.backbone, entry.bits, entry.revision, entry.memory_gb)
    )
    labels = label_set(config.data) or []
    examples = client_examples(config.data, partition, total, 0).train
    rows = [encode_prompt(backbone.tokenizer, config.data.prompt, e.text, config.data.max_length)
            for e in examples]  # fmt: skip
    targets = torch.tensor([labels.index(e.label) for e in examples])
    head = backbone.model.get_output_embeddings().weight
    head = head[label_tokens(backbone.tokenizer, labels, config.data.prompt)].detach().float()
    down, up = nn.Linear(backbone.hidden, config.method.latent), torch.linalg.pinv(head)
    body = backbone.model.model

    @torch.no_grad()
    def states(chosen: list[int]) -> Tensor:
        width = max(len(rows[i]) for i in chosen)
        ids = torch.zeros(len(chosen), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for k, i in enumerate(chosen):
            ids[k, : len(rows[i])] = torch.tensor(rows[i])
            mask[k, : len(rows[i])] = 1
        hidden = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return hidden[torch.arange(len(chosen)), mask.sum(1) - 1].float()

    kept = states(list(range(len(rows)))) if cached else torch.empty(0)
    bank = _Bank(config, len(labels))
    optimizer = torch.optim.AdamW(bank.parameters(), lr=config.train.learning_rate, fused=True)
    generator = torch.Generator().manual_seed(0)
    size = min(config.train.batch_size, len(rows))
    started = time.perf_counter()
    for _ in range(config.train.local_steps):
        chosen = torch.randperm(len(rows), generator=generator)[:size]
        x = kept[chosen] if cached else states(chosen.tolist())
        with torch.no_grad():
            z = down(x)
        logits = (x + F.linear(bank(z), up)) @ head.T
        loss = F.cross_entropy(logits, targets[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(bank.parameters(), config.train.clip_norm)
        optimizer.step()
    return time.perf_counter() - started


def bare_seconds_per_client_round(
    preset: str, cached: bool, repeats: int = 5, overrides: Sequence[str] = ()
) -> float:
    """Median over repeats of the mean over clients, in seconds, on one thread."""
    torch.set_num_threads(1)
    config = compose(preset, list(overrides))
    total = sum(entry.clients for entry in config.types)
    for partition in range(total):  # load and warm up
        _client_seconds(config, partition, total, cached)
    means = []
    for _ in range(repeats):
        seconds = [_client_seconds(config, partition, total, cached) for partition in range(total)]
        means.append(statistics.fmean(seconds))
    return statistics.median(means)
