"""Pre-trains the embedded family: one tokenizer, three LLaMAs of different width and depth.

The three models are trained separately, from scratch and from different seeds and data orders,
with the plain next-token loss on the corpus of :mod:`.corpus`. The log of the shipped weights is
``pretrain-<name>.log.jsonl`` beside this file.

Run: ``python -m heterotune_flwr.backbones.embedded.pretrain --corpus FILE --out DIR --name tiny-a``.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from heterotune_flwr.backbones.cpu_compute import slow_bfloat16
from heterotune_flwr.backbones.embedded.corpus import PROMPT, TASK_SECTIONS

VOCABULARY = 4096
SEQUENCE = 128


@dataclass(frozen=True)
class Shape:
    """Width, depth and schedule of one family member."""

    hidden: int
    layers: int
    inner: int
    heads: int
    kv_heads: int
    seed: int
    learning_rate: float


FAMILY = {
    "tiny-a": Shape(128, 4, 352, 4, 2, seed=11, learning_rate=4e-3),
    "tiny-b": Shape(192, 6, 512, 6, 3, seed=22, learning_rate=3e-3),
    "tiny-c": Shape(256, 8, 640, 8, 4, seed=33, learning_rate=2e-3),
}


def read_corpus(path: Path) -> list[str]:
    """The documents of ``corpus.jsonl.gz``."""
    with gzip.open(path, "rt") as lines:
        return [json.loads(line)["text"] for line in lines]


def train_tokenizer(documents: list[str], out: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE; every section name is made one token, as words of that weight would be."""
    labels = [f"{PROMPT.format(text='')} {name}" for name in TASK_SECTIONS] * 3000
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        documents + labels,
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        show_progress=False,
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,  # the wrapper has no public accessor
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="right",
    )
    tokenizer.save_pretrained(out)
    return tokenizer


def pack(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """One long token row ``<bos> doc <eos> <bos> doc <eos> ...`` (int32)."""
    ids: list[int] = []
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for start in range(0, len(documents), 4096):
        encoded = tokenizer(documents[start : start + 4096], add_special_tokens=False)["input_ids"]
        for row in encoded:
            ids += [bos, *row[: 4 * SEQUENCE], eos]
    return torch.tensor(ids, dtype=torch.int32)


def batches(tokens: torch.Tensor, batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless shuffled batches ``batch x SEQUENCE``; a new offset every epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(SEQUENCE, (1,), generator=generator))
        rows = (len(tokens) - offset) // SEQUENCE
        table = tokens[offset : offset + rows * SEQUENCE].view(rows, SEQUENCE)
        order = torch.randperm(rows, generator=generator)
        for start in range(0, rows - batch + 1, batch):
            yield table[order[start : start + batch]].long()


def build(shape: Shape, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A freshly initialised family member."""
    torch.manual_seed(shape.seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, held_out: torch.Tensor, bytes_per_token: float) -> float:
    """Held-out loss in bits per byte of text."""
    model.eval()
    parts = torch.split(held_out, 32)
    losses = [float(model(input_ids=rows, labels=rows).loss) for rows in parts]
    model.train()
    return sum(losses) / len(losses) / math.log(2) / bytes_per_token


def train(name: str, tokens: torch.Tensor, tokenizer: PreTrainedTokenizerFast, *,
          out: Path, minutes: float, batch: int, bytes_per_token: float) -> None:  # fmt: skip
    """Trains one member for a fixed processor time (cosine schedule over it), saves it as bf16."""
    shape = FAMILY[name]
    model = build(shape, tokenizer)
    model.set_attn_implementation("eager")  # the fused CPU backward is several times slower
    compiled: Any = torch.compile(model)
    held_out = tokens[: 128 * SEQUENCE].view(128, SEQUENCE).long()
    stream = batches(tokens[128 * SEQUENCE :], batch, shape.seed)
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=shape.learning_rate, betas=(0.9, 0.95))
    log = (out / f"pretrain-{name}.log.jsonl").open("w")
    start, step, running = time.process_time(), 0, 0.0
    while (progress := (time.process_time() - start) / (60 * minutes)) < 1:
        rate = min(1.0, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = shape.learning_rate * rate
        rows = next(stream)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not slow_bfloat16()):
            loss = compiled(input_ids=rows, labels=rows).loss
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        running += float(loss.detach())
        if step % 200 == 0:
            entry = {"step": step, "tokens": step * batch * SEQUENCE, "loss": round(running / 200, 4),
                     "minutes": round((time.process_time() - start) / 60, 2)}  # fmt: skip
            running = 0.0
            if step % 500 == 0:
                entry["held_out_bits_per_byte"] = round(
                    bits_per_byte(model, held_out, bytes_per_token), 4
                )
                save(model, tokenizer, out / name)
            print(name, entry, flush=True)
            log.write(json.dumps(entry) + "\n")
            log.flush()
    final = {"step": step, "tokens": step * batch * SEQUENCE, "threads": torch.get_num_threads(),
             "minutes": round((time.process_time() - start) / 60, 2), "parameters": model.num_parameters(),
             "held_out_bits_per_byte": round(bits_per_byte(model, held_out, bytes_per_token), 4)}  # fmt: skip
    log.write(json.dumps(final) + "\n")
    log.close()
    save(model, tokenizer, out / name)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """bf16 safetensors plus the tokenizer (training goes on in float32)."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Command line: one member per call; the first call trains the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", choices=sorted(FAMILY), required=True)
    parser.add_argument("--minutes", type=float, default=30.0, help="processor minutes")
    parser.add_argument("--batch", type=int, default=32, help="sequences of 128 tokens per step")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    documents = read_corpus(args.corpus)
    random.Random(0).shuffle(documents)
    folder = args.out / "tokenizer"
    if folder.exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    else:
        tokenizer = train_tokenizer(documents, folder)
    tokens = pack(documents, tokenizer)
    size = sum(len(text.encode()) for text in documents)
    print(f"{len(tokens) / 1e6:.1f} M tokens, {size / len(tokens):.2f} bytes per token", flush=True)
    train(args.name, tokens, tokenizer, out=args.out, minutes=args.minutes, batch=args.batch,
          bytes_per_token=size / len(tokens))  # fmt: skip


if __name__ == "__main__":
    main()
