"""Tiny random backbones on disk, with a real tokenizer, for tests of everything above the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXTS = [
    "red apples grow on trees in the garden",
    "fast engines need oil and careful drivers",
    "the violin plays a slow and quiet song",
    "Package: a text editor for the terminal\nSection: fruit",
    "Package: tools for music and engines\nSection: motor",
]
LABELS = ["fruit", "motor", "music"]


def save_tokenizer(
    directory: Path, template: str | None = None, marks: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Bytes and a few words; ``template`` is its chat template, ``marks`` further control tokens."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        TEXTS * 20 + [f" {name}" for name in LABELS] * 200,
        vocab_size=400,
        special_tokens=["<pad>", "<bos>", "<eos>", *marks],
        show_progress=False,
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    return tokenizer


def save_backbone(
    directory: Path,
    hidden: int = 32,
    layers: int = 3,
    seed: int = 0,
    template: str | None = None,
    marks: Sequence[str] = (),
) -> Path:
    """A LLaMA with random weights of a size at which its states differ between texts."""
    tokenizer = save_tokenizer(directory, template, marks)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def write_rows(path: Path, count: int, offset: int = 0) -> Path:
    """A .jsonl file whose labels can be told from the texts."""
    import json

    rows = []
    for number in range(offset, offset + count):
        label = number % len(LABELS)
        words = TEXTS[label].split()
        start = number % 4
        text = " ".join(words[start : start + 4]) + f" {number}"
        rows.append({"text": text, "label": LABELS[label], "client": f"owner-{number % 7}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
