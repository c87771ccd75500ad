"""Loading a frozen backbone at its bits, once per process and, on CPU, once per machine.

``nf4``, ``nf4-single`` and ``int8`` are the real bitsandbytes formats, on CPU as on GPU; embeddings
and the unembedding (``lm_head``) are never quantized. ``bf16`` and ``fp32`` load as they say. All of
them are memory-mapped: from the source itself if it has the format, else from :mod:`.store`.
"""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from heterotune_flwr.backbones.bits import check_bits, default_device, import_bitsandbytes
from heterotune_flwr.backbones.bnb_cpu import apply_dequantize_remedy, apply_repacking_remedy
from heterotune_flwr.backbones.cpu_compute import (
    compute_in_float32,
    slow_bfloat16,
    train_attention_in_float32,
)
from heterotune_flwr.backbones.cpu_memory import return_freed_memory
from heterotune_flwr.backbones.head import HeadScaling, measured_scaling
from heterotune_flwr.backbones.headers import damaged_json, mend_hint, tensor_headers
from heterotune_flwr.backbones.quantized import check_stored_bits, stored_bits
from heterotune_flwr.backbones.sources import (
    QUANTIZED,
    BackboneSpec,
    fingerprint,
    resolve_source,
)
from heterotune_flwr.backbones.store import Loader, shared_model
from heterotune_flwr.backbones.tokenizer import learned_positions, load_tokenizer, padding_id
from heterotune_flwr.errors import BackboneError, one_line

log = logging.getLogger(__name__)
# bitsandbytes, which other libraries import too, warns that an optional faster kernel package is missing: nothing is
# wrong without it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@dataclass(frozen=True, eq=False)
class Backbone:
    """A loaded, frozen causal language model in evaluation mode.

    Attributes
    ----------
    spec
        What was asked for.
    model
        ``transformers`` causal LM; no parameter requires a gradient.
    tokenizer
        Its tokenizer (:func:`.tokenizer.load_tokenizer`).
    fingerprint
        Digest of configuration, tokenizer, unquantized weights and bits.
    hidden, layers, parameters
        d, number of decoder blocks, number of weights before quantization.
    linear_shapes
        (in, out) of every linear layer but the unembedding: what LoRA on all layers adapts.
    scaling
        What the family does to its logits around the unembedding.
    pad_id
        Id that stands for padding, which is masked; the tokenizer's own may have no row.
    positions
        Longest sequence of a model with a learned table of positions, else None.

    """

    spec: BackboneSpec
    model: Any
    tokenizer: Any
    fingerprint: str
    hidden: int
    layers: int
    parameters: int
    linear_shapes: tuple[tuple[int, int], ...]
    scaling: HeadScaling = HeadScaling()
    pad_id: int = 0
    positions: int | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights and every input to the model live."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @property
    def type_key(self) -> str:
        """The model type, ``name[#revision]@bits``."""
        return self.spec.type_key

    @property
    def model_bytes(self) -> int:
        """Bytes of the whole model in bf16: one denominator of every saving."""
        return 2 * self.parameters

    @property
    def lora16_bytes(self) -> int:
        """Bytes of LoRA r=16 on all linear layers in bf16: the other denominator."""
        return sum(2 * 16 * (inputs + outputs) for inputs, outputs in self.linear_shapes)


#: The explicit per-process cache: one copy of a backbone however many clients use it.
_loaded: dict[tuple[BackboneSpec, str], Backbone] = {}


def clear_backbones() -> None:
    """Forget every loaded backbone (the memory goes when the last user lets go)."""
    _loaded.clear()


def load_backbone(spec: BackboneSpec, device: str | None = None) -> Backbone:
    """Load ``spec``, or return it from this process's cache.

    The returned object is shared: adapters are attached to it and detached cleanly
    (:mod:`heterotune_flwr.tuning.adapters`), its weights never change.

    Raises BackboneError: the source is unknown or unreadable, or the bits cannot be had on this device.
    """
    device = device or default_device()
    key = (spec, device)
    if key not in _loaded:
        check_bits(spec.bits, device)
        _loaded[key] = _load(spec, device)
    return _loaded[key]


def _quantization(bits: str) -> Any:
    """Return the bitsandbytes configuration of ``bits``, None for plain floating point."""
    if bits not in QUANTIZED:
        return None
    from transformers import BitsAndBytesConfig

    if bits == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=bits == "nf4",
        llm_int8_skip_modules=["lm_head"],
    )


def load_unshared(spec: BackboneSpec, directory: Path, device: str) -> Any:
    """Read a backbone's source and quantize it in this process's memory (errors of the libraries)."""
    given: dict[str, Any] = {}
    if stored_bits(spec.source, directory) is not None:
        given["config"] = _stored_config(directory)
    elif (quantization := _quantization(spec.bits)) is not None:
        # An explicit None would make transformers forget a quantization named in config.json.
        given["quantization_config"] = quantization
    model, found = _from_pretrained(spec, directory, device, **given)
    _check_complete({what: found.get(what) for what in ("missing_keys", "mismatched_keys")})
    return model


def _stored_config(directory: Path) -> Any:
    """Configuration of a checkpoint quantized already, computing in bfloat16 as every other here."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    for part in (config, config.get_text_config()):
        if isinstance(found := getattr(part, "quantization_config", None), dict):
            found["bnb_4bit_compute_dtype"] = "bfloat16"
    return config


def _check_complete(found: Mapping[str, Any]) -> None:
    """Refuse what transformers only warns of, to go on with random weights."""
    wrong = {what: sorted(map(str, keys))[:3] for what, keys in found.items() if keys}
    if wrong:
        raise ValueError(f"the weights do not fit the configuration: {wrong}")


def _from_pretrained(spec: BackboneSpec, directory: Path, device: str, **given: Any) -> Any:
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32 if spec.bits == "fp32" else torch.bfloat16,
        device_map={"": device},
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,  # None asks at the terminal whether to run what lies in the folder
        output_loading_info=True,
        **given,
    )
    model.eval()
    model.requires_grad_(False)
    return model, found


def prepare_libraries(bits: str) -> None:
    """Quieten the libraries and put the bitsandbytes remedies in place; before a model is built."""
    quieten_libraries()
    if bits in QUANTIZED:
        import_bitsandbytes(bits)
        apply_repacking_remedy()
        apply_dequantize_remedy()
        # It warns at every single multiplication that int8 computes in float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def quieten_libraries() -> None:
    """Silence what libraries tell of themselves: progress bars, names that will go, kernels that are not there."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")


def _unloadable(spec: BackboneSpec, directory: Path, error: Exception) -> BackboneError:
    """Say what, where and how to mend when a library cannot read a source."""
    broken = damaged_json(directory)
    reason = one_line(error)
    what = f"{broken} is no readable JSON" if broken else f"{type(error).__name__}: {reason}"
    return BackboneError(
        f"backbone {spec.type_key} cannot be loaded from {directory} ({what}); if it is damaged, "
        f"{mend_hint(spec.source)}"
    )


def loader_of(spec: BackboneSpec, directory: Path, device: str) -> Loader:
    """How a backbone gets into memory (BackboneError: what is in ``directory`` cannot be read)."""

    def direct() -> Any:
        try:
            return load_unshared(spec, directory, device)
        except Exception as error:  # damaged files make the libraries raise whatever they like
            raise _unloadable(spec, directory, error) from error

    def stored(entry: Path) -> Any:
        model, found = _from_pretrained(spec, entry, device)  # its config says how it is quantized
        _check_complete(found)  # unexpected keys too: we wrote it
        return model

    return Loader(direct, stored, count_parameters)


def checked_source(spec: BackboneSpec) -> Path:
    """Folder with a backbone's published weights (BackboneError: not here, damaged, or not to be had at its bits)."""
    directory = resolve_source(spec.source, spec.revision)
    check_stored_bits(spec.source, directory, spec.bits)
    tensor_headers(spec.source, directory)  # a truncated file is told before anything is made of it
    return directory


def compute_as_trained(model: Any) -> None:
    """Let a loaded model compute as backbones do in a federation, on the device it is on (in place, no weights change).

    Once more changes nothing.
    """
    if model.get_input_embeddings().weight.device.type == "cpu":
        train_attention_in_float32(model)
        if slow_bfloat16():
            compute_in_float32(model)


def _load(spec: BackboneSpec, device: str) -> Backbone:
    prepare_libraries(spec.bits)
    if device == "cpu":
        return_freed_memory()
    directory = checked_source(spec)
    log.info("loading %s from %s", spec.type_key, directory)
    model = shared_model(spec, directory, device, loader_of(spec, directory, device))
    compute_as_trained(model)
    return describe_model(spec, directory, model)


def describe_model(spec: BackboneSpec, directory: Path, model: Any) -> Backbone:
    """What is known of a loaded ``model`` of the backbone whose published files are in ``directory``.

    Raises BackboneError: its tokenizer cannot be read, or belongs to another model.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    try:
        tokenizer = load_tokenizer(spec.source, directory, rows)
    except BackboneError:
        raise
    except Exception as error:
        raise _unloadable(spec, directory, error) from error
    config = model.config.get_text_config()
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    tables = ((name, tensor.shape) for name, tensor in tensors)
    return Backbone(
        spec=spec,
        model=model,
        tokenizer=tokenizer,
        fingerprint=fingerprint(directory, spec.bits),
        hidden=int(config.hidden_size),
        layers=int(config.num_hidden_layers),
        parameters=count_parameters(model),
        linear_shapes=_linear_shapes(model),
        scaling=_scaling(spec, model),
        pad_id=padding_id(tokenizer, rows),
        positions=learned_positions(tables, getattr(config, "max_position_embeddings", None)),
    )


def _scaling(spec: BackboneSpec, model: Any) -> HeadScaling:
    try:
        return measured_scaling(model)
    except BackboneError:
        raise
    except Exception as error:  # a family's own code raises whatever it likes
        reason = one_line(error)
        raise BackboneError(
            f"backbone {spec.type_key}: models of the family {model.config.model_type!r} cannot be trained here, "
            f"because their losses would not be the model's own ({reason}); use another backbone"
        ) from error


def _linear_shapes(model: Any) -> tuple[tuple[int, int], ...]:
    head = model.get_output_embeddings()
    sides = (linear_sides(module) for module in model.modules() if module is not head)
    return tuple(shape for shape in sides if shape is not None)


def linear_sides(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear layer, GPT-2's ``Conv1D`` among them; None for any other module."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return int(module.in_features), int(module.out_features)
    return (int(module.nx), int(module.nf)) if isinstance(module, Conv1D) else None


def count_parameters(model: nn.Module) -> int:
    """Weights of a model before quantization (tied weights once; a 4-bit byte holds two)."""
    total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        total += state.shape.numel() if state is not None else parameter.numel()
    return total
