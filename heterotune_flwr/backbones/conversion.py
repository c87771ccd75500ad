"""From a GGUF file to a directory that ``from_pretrained`` loads in a second.

transformers dequantizes GGUF weights while loading, which takes many seconds and twice the memory;
done once, the result is kept as bfloat16 safetensors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from heterotune_flwr.backbones.assets import cache_dir
from heterotune_flwr.backbones.files import file_digest, has_weights
from heterotune_flwr.backbones.manifest import whole_directory
from heterotune_flwr.errors import BackboneError, one_line

log = logging.getLogger(__name__)


def build_directory(
    target: Path, build: Callable[[Path], None], ready: Callable[[Path], bool] = has_weights
) -> Path:
    """Make directory ``target`` by ``build(directory)``; it appears whole or not at all.

    One process builds while others wait; nothing is done when the target is ``ready``.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if ready(target):
            return target
        with whole_directory(target, {"name": target.name}) as directory:
            build(directory)
    return target


def convert_gguf(gguf: Path, target: Path) -> None:
    """Write weights (bfloat16), configuration and tokenizer of a GGUF file into ``target``.

    Raises BackboneError: transformers cannot read the file.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16
        )
        tokenizer = AutoTokenizer.from_pretrained(
            gguf.parent, gguf_file=gguf.name, trust_remote_code=False
        )
    except Exception as error:  # the reader raises whatever a damaged file makes it raise
        reason = one_line(error)
        raise BackboneError(f"{str(gguf)!r} is not a readable GGUF model: {reason}") from error
    # What was dequantized is no longer a quantized model: without this it could not be saved.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def converted_gguf(gguf: Path) -> Path:
    """Directory of a GGUF file's weights in the cache, converted at the first call."""
    target = cache_dir() / "backbones" / f"{gguf.stem}-{file_digest(gguf)[:12]}"
    if not has_weights(target):
        log.info("converting %s once, into %s", gguf, target)
    return build_directory(target, lambda directory: convert_gguf(gguf, directory))
