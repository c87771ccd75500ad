"""A plain model folder as one GGUF file, as llama.cpp and what is built on it read.

Names of tensors and settings are those of the ``gguf`` package; what llama.cpp stores otherwise than transformers is
turned here: rows of queries and keys (Llama's rotary pairs), and weights of norms (Gemma's are one less than what
multiplies). Matrices keep the folder's dtype, vectors are float32, as llama.cpp wants them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from heterotune_flwr.errors import BackboneError
from heterotune_flwr.export.gguf_tokenizer import add_tokenizer, check_tokenizer

#: transformers' family -> llama.cpp's architecture.
ARCHITECTURES = {"llama": "llama", "gemma3_text": "gemma3"}
#: Gemma-3: every so manyth block attends to everything; llama.cpp takes it for granted.
_GEMMA_FULL_EVERY = 6
_GEMMA_LOCAL_BASE = 10_000.0
#: The family, and transformers' name, of the one way of scaling positions that llama.cpp reads as a tensor of factors.
_SCALED = ("llama", "llama3")


def check_family(family: str, name: str) -> None:
    """Refuse a family that no GGUF is written of (BackboneError)."""
    if family not in ARCHITECTURES:
        raise BackboneError(
            f"a GGUF file is written of the families {', '.join(ARCHITECTURES)}, but {name} is of {family!r}; "
            "export --as merged and convert that folder with llama.cpp's own converter"
        )


def check_convertible(folder: Path, name: str) -> None:
    """Refuse, before any work, a model folder of which no GGUF can be written (BackboneError).

    ``folder``: its ``config.json`` and tokenizer are read, no weight; ``name``: how messages call the model.
    """
    config = _text_config(folder)
    check_family(config.model_type, name)
    check_tokenizer(folder, name)
    kind = _rope(config).get("rope_type", "default")
    if kind != "default" and (config.model_type, kind) != _SCALED:
        raise BackboneError(
            f"a GGUF file cannot be written of {name}: its positions are scaled ({kind!r}); export --as merged and "
            "convert that folder with llama.cpp's own converter"
        )
    if config.model_type == "gemma3_text" and not _is_usual_gemma(config):
        raise BackboneError(
            f"a GGUF file cannot be written of {name}: its attention is not laid out as in released Gemma-3 models; "
            "export --as merged instead"
        )


def write_gguf(folder: Path, target: Path, name: str) -> None:
    """Write the model of a plain folder (as :func:`.merged.write_merged` makes it) into the file ``target``.

    ``name`` is what the file says the model is called. The file appears whole or not at all.

    Raises
    ------
    BackboneError
        The family, its attention or its tokenizer has no form here; see :func:`check_convertible`.

    """
    from gguf import GGUFWriter

    check_convertible(folder, name)
    config = _text_config(folder)
    partial = target.with_name(f".{target.name}.part")
    logging.getLogger("gguf.gguf_writer").setLevel(logging.WARNING)
    writer = GGUFWriter(partial, ARCHITECTURES[config.model_type])
    try:
        _add_settings(writer, config, name)
        add_tokenizer(writer, folder, int(config.vocab_size))
        _write(writer, folder, config)
        os.replace(partial, target)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)


def _text_config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()


def _rope(config: Any) -> dict[str, Any]:
    """Settings of the rotary positions; of the blocks that attend to everything where kinds of blocks differ."""
    found: dict[str, Any] = config.rope_parameters
    inner: dict[str, Any] = found.get("full_attention", found)
    return inner


def _is_usual_gemma(config: Any) -> bool:
    full = [index for index, kind in enumerate(config.layer_types) if kind == "full_attention"]
    usual = list(range(_GEMMA_FULL_EVERY - 1, config.num_hidden_layers, _GEMMA_FULL_EVERY))
    local = config.rope_parameters["sliding_attention"]
    return (
        full == usual
        and local.get("rope_type", "default") == "default"
        and float(local["rope_theta"]) == _GEMMA_LOCAL_BASE
        and config.query_pre_attn_scalar == config.head_dim
        and config.final_logit_softcapping is None
        and config.attn_logit_softcapping is None
    )


def _add_settings(writer: Any, config: Any, name: str) -> None:
    from gguf import LlamaFileType

    kinds = {
        torch.float32: LlamaFileType.ALL_F32,
        torch.float16: LlamaFileType.MOSTLY_F16,
        torch.bfloat16: LlamaFileType.MOSTLY_BF16,
    }
    heads = int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(kinds[config.dtype])
    writer.add_vocab_size(int(config.vocab_size))
    writer.add_context_length(int(config.max_position_embeddings))
    writer.add_embedding_length(int(config.hidden_size))
    writer.add_block_count(int(config.num_hidden_layers))
    writer.add_feed_forward_length(int(config.intermediate_size))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.num_key_value_heads))
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(_rope(config)["rope_theta"]))
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(int(config.sliding_window))


def _write(writer: Any, folder: Path, config: Any) -> None:
    """Announce every tensor, then write one after the other: never two in memory."""
    from gguf import GGMLQuantizationType

    kinds = {
        torch.float32: GGMLQuantizationType.F32,
        torch.float16: GGMLQuantizationType.F16,
        torch.bfloat16: GGMLQuantizationType.BF16,
    }
    for name, tensor in _tensors(folder, config):
        plain = _bytes(tensor)
        writer.add_tensor_info(name, plain.shape, plain.dtype, plain.nbytes, kinds[tensor.dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor in _tensors(folder, config):
        writer.write_tensor_data(_bytes(tensor))


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """A tensor's bytes, row by row (``... x n``: ``... x n size``): numpy knows no bfloat16."""
    plain: NDArray[np.uint8] = tensor.contiguous().view(torch.uint8).numpy()
    return plain


def _tensors(folder: Path, config: Any) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's names and tensors, as it stores them; an unembedding that is the embedding's is left out.

    Where positions are scaled (Llama-3), what every rotary frequency is divided by comes last.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    named = {name: key for key, name in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(
        named[ARCHITECTURES[config.model_type]], int(config.num_hidden_layers)
    )
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in sorted(file.keys()):
                if key == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                name = names.get_name(key, try_suffixes=(".weight", ".bias"))
                if name is None:
                    raise BackboneError(f"llama.cpp has no name for the tensor {key!r} of {path}")
                yield name, _stored(key, file.get_tensor(key), config)
    if _rope(config).get("rope_type") == _SCALED[1]:
        yield "rope_freqs.weight", _divisors(config)


def _divisors(config: Any) -> Tensor:
    """Rotary frequencies (half a head's width, float32) over what the configuration's scaling makes of them."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS[_SCALED[1]](config, torch.device("cpu"))
    exponents = torch.arange(len(scaled), dtype=torch.float32) / len(scaled)
    plain = float(_rope(config)["rope_theta"]) ** -exponents
    found: Tensor = plain / scaled
    return found


def _stored(key: str, tensor: Tensor, config: Any) -> Tensor:
    """A tensor as llama.cpp stores it."""
    if config.model_type == "llama" and ".self_attn." in key:
        part = key.split(".")[-2]
        if part in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
            tensor = _interleaved(tensor, int(heads))
    if config.model_type == "gemma3_text" and key.endswith("norm.weight"):
        tensor = tensor.float() + 1
    return tensor.float() if tensor.ndim < 2 else tensor


def _interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys with rotary pairs side by side; transformers keeps a head's halves apart."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)
