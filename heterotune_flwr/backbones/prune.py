"""A smaller real backbone out of a larger one: structured pruning by activations, then brief healing.

What is cut away is chosen on public calibration texts: whole blocks that change the residual stream least
(1 - cosine of input and output), key-value groups and MLP units by the size of what they write, and the
residual stream itself by rotating it to its principal axes and keeping the leading ones (the rotation of
SliceGPT, https://arxiv.org/abs/2401.15024, here one for all blocks, so that nothing is added to the
architecture). Healing is distillation: at every token of public texts the small model learns what its parent predicts
(https://arxiv.org/abs/1503.02531). The result is an ordinary Llama directory; call it "pruned and healed", never by its
parent's name alone.
"""

from __future__ import annotations

import gzip
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from heterotune_flwr.backbones.assets import asset_path
from heterotune_flwr.backbones.cpu_compute import slow_bfloat16
from heterotune_flwr.backbones.sources import resolve_source
from heterotune_flwr.backbones.tokens import encode_texts
from heterotune_flwr.errors import BackboneError
from heterotune_flwr.jsons import parse_json

log = logging.getLogger(__name__)
Report = Callable[[str], None]

CALIBRATION_TEXTS = 512
BLOCK = 96
BATCH = 8
REPORT_SECONDS = 10.0


@dataclass
class Activations:
    """Sums over calibration tokens.

    ``change`` (L): 1 - cosine over a block; ``covariance`` (d x d, float64) of RMS-normalised residual
    states; ``groups`` (L x kv) and ``units`` (L x m): mean square of what a key-value group or MLP unit
    writes into the residual stream.
    """

    change: Tensor
    covariance: Tensor
    groups: Tensor
    units: Tensor
    tokens: int = 0


def _packed(tokenizer: Any, texts: Sequence[str], size: int) -> Tensor:
    """All texts, separated by eos, cut into rows of ``size`` tokens."""
    ids: list[int] = []
    for row in encode_texts(tokenizer, texts, special=False):
        ids += [*row, tokenizer.eos_token_id]
    count = len(ids) // size
    if count < 1:
        raise BackboneError(f"the healing texts have only {len(ids)} tokens; {size} are needed")
    return torch.tensor(ids[: count * size]).reshape(count, size)


def _check_family(model: Any, source: Path) -> None:
    layer = getattr(getattr(model, "model", None), "layers", [None])[0]
    names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    modules = dict(layer.named_modules()) if layer is not None else {}
    if model.config.model_type != "llama" or any(name not in modules for name in names):
        raise BackboneError(
            f"{source} is a {model.config.model_type!r} model; only the Llama architecture can be pruned"
        )


@torch.no_grad()
def measure_activations(model: Any, rows: Tensor) -> Activations:
    """Run calibration rows (N x T token ids) through a Llama and sum what decides the cuts."""
    config, layers = model.config, model.model.layers
    kv, hidden = config.num_key_value_heads, config.hidden_size
    found = Activations(
        torch.zeros(len(layers)),
        torch.zeros(hidden, hidden, dtype=torch.float64),
        torch.zeros(len(layers), kv),
        torch.zeros(len(layers), config.intermediate_size),
    )

    def residual(x: Tensor) -> None:
        flat = x.reshape(-1, hidden).float()
        flat = flat / flat.pow(2).mean(-1, keepdim=True).sqrt()
        found.covariance += (flat.T @ flat).double()

    def block_hook(index: int) -> Any:
        def hook(_module: nn.Module, args: Any, output: Any) -> None:
            before, after = args[0].float(), (output[0] if isinstance(output, tuple) else output)
            residual(before)
            cosine = functional.cosine_similarity(before, after.float(), dim=-1)
            found.change[index] += (1 - cosine).sum()

        return hook

    def write_hook(target: Tensor, grouped: int | None) -> Any:
        def hook(module: nn.Linear, args: Any) -> None:
            x = args[0].reshape(-1, module.in_features).float()
            if grouped is None:
                target.add_(x.pow(2).sum(0) * module.weight.float().pow(2).sum(0))
                return
            parts = module.weight.float().reshape(module.out_features, grouped, -1)
            written = torch.einsum("tgi,ogi->tgo", x.reshape(len(x), grouped, -1), parts)
            target.add_(written.pow(2).sum((0, 2)))

        return hook

    handles = []
    for index, layer in enumerate(layers):
        handles.append(layer.register_forward_hook(block_hook(index)))
        o_proj, down = layer.self_attn.o_proj, layer.mlp.down_proj
        handles.append(o_proj.register_forward_pre_hook(write_hook(found.groups[index], kv)))
        handles.append(down.register_forward_pre_hook(write_hook(found.units[index], None)))
    try:
        for batch in torch.split(rows, BATCH):
            model.model(input_ids=batch, use_cache=False)
            found.tokens += batch.numel()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _principal_axes(covariance: Tensor, keep: int) -> tuple[Tensor, float]:
    """(d x keep orthonormal axes, share of the energy they hold)."""
    values, vectors = torch.linalg.eigh(covariance)
    axes = vectors[:, -keep:].flip(1).float()
    return axes, float(values[-keep:].sum() / values.sum())


def _small_config(config: Any, hidden: int, layers: int) -> Any:
    """The parent's configuration at the new width and depth, in the parent's proportions."""
    group = config.num_attention_heads // config.num_key_value_heads
    kv = max(1, round(config.num_key_value_heads * hidden / config.hidden_size))
    small = type(config).from_dict(config.to_dict())
    small.hidden_size, small.num_hidden_layers = hidden, layers
    small.num_key_value_heads, small.num_attention_heads = kv, kv * group
    small.intermediate_size = round(config.intermediate_size * hidden / config.hidden_size)
    small.tie_word_embeddings = False  # the final norm is folded into the unembedding only
    return small


@torch.no_grad()
def prune(model: Any, found: Activations, hidden: int, layers: int) -> Any:
    """A new float32 Llama with the most important parts of ``model``."""
    config = model.config
    small = _small_config(config, hidden, layers)
    axes, share = _principal_axes(found.covariance, hidden)
    # RMSNorm now averages over fewer channels: its scale makes up for the energy that was cut off.
    scale = math.sqrt(share * config.hidden_size / hidden)
    pruned = type(model)(small).float()
    kept = sorted(found.change.argsort(descending=True)[:layers].tolist())
    size = config.head_dim
    width = size * (config.num_attention_heads // config.num_key_value_heads)
    for new, index in zip(pruned.model.layers, kept, strict=True):
        old = model.model.layers[index]
        groups = found.groups[index].argsort(descending=True)[: small.num_key_value_heads].sort()[0]
        units = found.units[index].argsort(descending=True)[: small.intermediate_size].sort()[0]
        queries = (groups[:, None] * width + torch.arange(width)).flatten()
        keys = (groups[:, None] * size + torch.arange(size)).flatten()
        first, second = (
            old.input_layernorm.weight.float(),
            old.post_attention_layernorm.weight.float(),
        )
        for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            weight = getattr(old.self_attn, name).weight.float()
            getattr(new.self_attn, name).weight.copy_((weight[rows] * first) @ axes)
        new.self_attn.o_proj.weight.copy_(axes.T @ old.self_attn.o_proj.weight.float()[:, queries])
        for name in ("gate_proj", "up_proj"):
            weight = getattr(old.mlp, name).weight.float()
            getattr(new.mlp, name).weight.copy_((weight[units] * second) @ axes)
        new.mlp.down_proj.weight.copy_(axes.T @ old.mlp.down_proj.weight.float()[:, units])
        new.input_layernorm.weight.fill_(scale)
        new.post_attention_layernorm.weight.fill_(scale)
    embedding = model.get_input_embeddings().weight.float()
    final = model.model.norm.weight.float()
    pruned.get_input_embeddings().weight.copy_(embedding @ axes)
    pruned.get_output_embeddings().weight.copy_(
        (model.get_output_embeddings().weight.float() * final) @ axes
    )
    pruned.model.norm.weight.fill_(scale)
    return pruned


def _logits(model: Any, batch: Tensor) -> Tensor:
    """Of the next token at every place (``n x V``, float32)."""
    device = "cpu" if batch.device.type == "cpu" else "cuda"
    mixed = device == "cuda" or not slow_bfloat16()
    with torch.autocast(device, dtype=torch.bfloat16, enabled=mixed):
        logits: Tensor = model(input_ids=batch, use_cache=False).logits
    return logits[:, :-1].flatten(0, 1).float()


def _loss(model: Any, batch: Tensor) -> Tensor:
    return functional.cross_entropy(_logits(model, batch), batch[:, 1:].flatten())


def _lesson(model: Any, parent: Any, batch: Tensor) -> Tensor:
    """Mean KL divergence (nats) of what the model predicts from what its parent does, at every token."""
    with torch.no_grad():
        wanted = _logits(parent, batch).log_softmax(-1)
    said = _logits(model, batch).log_softmax(-1)
    return functional.kl_div(said, wanted, reduction="batchmean", log_target=True)


def _epochs(count: int, generator: torch.Generator) -> Iterator[int]:
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


@torch.no_grad()
def held_out_loss(model: Any, rows: Tensor) -> float:
    """Mean next-token loss (nats) on rows of token ids."""
    return float(torch.stack([_loss(model, batch) for batch in torch.split(rows, BATCH)]).mean())


def heal(
    model: Any,
    parent: Any,
    rows: Tensor,
    steps: int,
    seed: int,
    report: Report,
    learning_rate: float = 6e-4,
) -> None:
    """Train in place to predict as the parent does; embeddings stay fixed (they are the parent's, rotated)."""
    model.train()
    model.get_input_embeddings().weight.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01
    )
    order = _epochs(len(rows), torch.Generator().manual_seed(seed))
    started = told = time.perf_counter()
    running = 0.0
    for step in range(steps):
        warm = min(1.0, (step + 1) / max(1, steps // 20))
        rate = learning_rate * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = _lesson(model, parent, rows[[next(order) for _ in range(BATCH)]])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        running = loss.item() if step == 0 else 0.95 * running + 0.05 * loss.item()
        now = time.perf_counter()
        if now - told >= REPORT_SECONDS:
            told, left = now, (now - started) / (step + 1) * (steps - step - 1)
            report(
                f"healing: step {step + 1}/{steps}, loss {running:.3f}, about {left / 60:.0f} min left"
            )
    model.requires_grad_(True)
    model.eval()


def prune_and_heal(
    source_dir: Path,
    out_dir: Path,
    texts: Sequence[str],
    hidden: int = 384,
    layers: int = 20,
    tokens: int = 100_000,
    seed: int = 0,
    report: Report = log.info,
) -> dict[str, float]:
    """Write a pruned and healed copy of a Llama directory, in bfloat16 with the parent's tokenizer.

    A 32nd of the public ``texts`` is held out to report the loss. ``hidden`` and ``layers`` are the new width and
    depth; heads and MLP shrink in proportion. Healing takes ``tokens``: 100,000 need 10 to 30 minutes on two CPU cores.
    Returns the held-out loss (nats per token) of the ``parent``, ``pruned`` and ``healed`` model.

    Raises BackboneError: not a Llama, not smaller than the parent, or too little text.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(source_dir)
    model = AutoModelForCausalLM.from_pretrained(source_dir, dtype=torch.bfloat16).eval()
    _check_family(model, source_dir)
    config = model.config
    if hidden > config.hidden_size or layers > config.num_hidden_layers:
        raise BackboneError(
            f"cannot prune {config.hidden_size} x {config.num_hidden_layers} to {hidden} x {layers}"
        )
    rows = _packed(tokenizer, texts, BLOCK)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    cut = max(1, len(rows) // 32)
    held, rows = rows[:cut], rows[cut:]
    if not len(rows):
        raise BackboneError("too few healing texts: everything was held out")
    report(
        f"reading calibration texts with the parent ({config.hidden_size} x {config.num_hidden_layers})"
    )
    found = measure_activations(model, rows[: max(1, CALIBRATION_TEXTS * 24 // BLOCK)])
    losses = {"parent": held_out_loss(model, held)}
    pruned = prune(model, found, hidden, layers)
    losses["pruned"] = held_out_loss(pruned, held)
    report(f"held-out loss: parent {losses['parent']:.3f}, pruned {losses['pruned']:.3f}")
    heal(pruned, model, rows, max(1, tokens // (BATCH * BLOCK)), seed, report)
    losses["healed"] = held_out_loss(pruned, held)
    report(f"held-out loss: healed {losses['healed']:.3f}")
    pruned.to(torch.bfloat16).save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    return losses


def build_pruned(directory: Path, report: Report) -> None:
    """``smollm2-pruned``: the fetched SmolLM2 at 384 x 20, healed on the shipped anchors."""
    texts: list[str] = []
    for name in ("debian-other", "wordnet", "debian-near"):
        path = asset_path(f"anchors/{name}.jsonl.gz")
        if path is None:
            raise BackboneError(f"the shipped texts {name} are not installed here")
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            texts += [parse_json(line)["text"] for line in lines]
    prune_and_heal(resolve_source("smollm2"), directory, texts, report=report)
