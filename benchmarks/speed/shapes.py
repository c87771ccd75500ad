"""Checkpoints with the shapes of well-known models, random weights, and the embedded family's tokenizer.

Neither bytes nor seconds depend on what the weights say, and nothing has to be downloaded.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

import heterotune_flwr

#: Published configurations: width, blocks, feed-forward width, heads, key heads, vocabulary, one matrix at both ends.
SHAPES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "smollm2-135m": (576, 30, 1536, 9, 3, 49_152, True),
    "llama-3.2-1b": (2048, 16, 8192, 32, 8, 128_256, True),
    "llama-3.2-3b": (3072, 28, 8192, 24, 8, 128_256, True),
    "llama-3.1-8b": (4096, 32, 14_336, 32, 8, 128_256, False),
}
#: To try a benchmark on a CPU.
TOYS: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "toy-64": (64, 2, 128, 4, 2, 4096, True),
    "toy-128": (128, 3, 256, 4, 2, 4096, False),
}
#: What a checkpoint takes of the embedded family, whose members share one tokenizer.
TOKENIZER = Path(heterotune_flwr.__file__).parent / "assets" / "embedded" / "tiny-a"


def make_checkpoint(shape: str, folder: Path, device: str = "cuda") -> None:
    """Write a checkpoint of this shape, made on ``device``."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    hidden, layers, inner, heads, key_heads, vocabulary, tied = {**SHAPES, **TOYS}[shape]
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=inner, num_attention_heads=heads,
        num_key_value_heads=key_heads, vocab_size=vocabulary, tie_word_embeddings=tied, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
