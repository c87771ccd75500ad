"""``bits: auto``: the widest format whose weights and working memory fit a client's budget.

Sizes come from the headers of the stored weights. What a client needs besides the weights is
assumed as :data:`WORKING_GB` (interpreter and libraries, or the CUDA context) plus
:data:`WORKING_SHARE` of the backbone's bf16 bytes (activations, adapter, gradients, optimizer).
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from filelock import FileLock

from heterotune_flwr.backbones.headers import TensorHeader, tensor_headers
from heterotune_flwr.backbones.quantized import stored_bits
from heterotune_flwr.backbones.sources import QUANTIZED, BackboneSpec, resolve_source
from heterotune_flwr.errors import BackboneError
from heterotune_flwr.exchange.storage import atomic_write_text, private_folder
from heterotune_flwr.jsons import parse_json
from heterotune_flwr.schema import AUTO, BITS

log = logging.getLogger(__name__)

WORKING_GB = 0.6
WORKING_SHARE = 0.1
#: Widest first; fp32 and nf4-single are chosen by people only.
CANDIDATES = ("bf16", "int8", "nf4")

_BLOCK = 64  # nf4: weights per scale
_NESTED_BLOCK = 256  # double quantization: scales per scale
#: nf4 keeps its code book (16 floats), that of its scales (256 floats) and a description per layer.
_LAYER_BYTES = {"nf4": 4 * (16 + 256) + 200, "nf4-single": 4 * 16 + 100}


def resolve_spec(
    source: str,
    bits: str,
    revision: str | None = None,
    memory_gb: float | None = None,
    device: str | None = None,
    kept: Path | None = None,
) -> BackboneSpec:
    """Return the spec of a configured backbone, ``auto`` replaced by the bits it stands for.

    Raises BackboneError: unknown bits, an unreadable backbone, or not even nf4 fits (the message says what would).

    Parameters
    ----------
    source, bits, revision
        As configured.
    memory_gb
        Budget (10^9 bytes) for the whole client; None takes the accelerator's free memory, or
        bf16 where there is no accelerator.
    device
        Torch device; None is the default one.
    kept
        File for an answer that depends on the memory free at this moment, so that all processes
        of a run give the same one.

    """
    if bits == AUTO:
        bits = chosen_bits(source, revision, memory_gb, device, kept)
    return BackboneSpec(source, bits, revision)


@functools.cache  # one process, one answer: free memory shrinks as soon as the backbone is loaded
def chosen_bits(
    source: str,
    revision: str | None,
    memory_gb: float | None,
    device: str | None,
    kept: Path | None,
) -> str:
    """What ``auto`` stands for here; asked once per process."""
    device = device or default_device()
    if memory_gb is not None:
        return _fitting(source, revision, memory_gb, "its budget", device)
    if not device.startswith("cuda"):
        widest = _widest(source, revision)
        log.info("%s: bits auto is %s (no memory budget)", source, widest)
        return widest
    if kept is None:
        return _fitting(source, revision, free_gb(device), f"free on {device}", device)
    private_folder(kept.parent)
    with FileLock(kept.with_suffix(".lock"), mode=0o600):
        if kept.is_file() and (known := kept.read_text().strip()) in BITS:
            return known
        bits = _fitting(source, revision, free_gb(device), f"free on {device}", device)
        atomic_write_text(kept, bits)
    return bits


def candidates(source: str, directory: Path) -> tuple[str, ...]:
    """Bits that ``auto`` chooses from, widest first: of a checkpoint quantized already, its own alone.

    Raises BackboneError: it is quantized in a format that no bits stand for.
    """
    stored = stored_bits(source, directory)
    return CANDIDATES if stored is None else (stored,)


def _widest(source: str, revision: str | None) -> str:
    if source.endswith(".gguf"):  # converted to bf16, which takes long
        return CANDIDATES[0]
    return candidates(source, resolve_source(source, revision, config_only=True))[0]


def _fitting(source: str, revision: str | None, budget: float, origin: str, device: str) -> str:
    directory = resolve_source(source, revision)
    needs = needed_gb(source, directory)
    refused = ""
    for bits in needs:
        if needs[bits] > budget:
            continue
        try:
            check_bits(bits, device)
        except BackboneError as error:
            refused = f" ({error})"
            continue
        log.info("%s: bits auto is %s, %.2f GB of %.2f GB (%s)", source, bits, needs[bits], budget,
                 origin)  # fmt: skip
        return bits
    # Rounded up: a budget of the number that is shown must do.
    listed = ", ".join(f"{bits} {math.ceil(1000 * needs[bits]) / 1000} GB" for bits in needs)
    raise BackboneError(
        f"backbone {source!r} does not fit {budget:.2f} GB ({origin}): it needs {listed}, weights "
        f"and working memory together{refused}; raise the budget or take a smaller backbone"
    )


def default_device() -> str:
    """``cuda`` when an accelerator can be used, else ``cpu``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def check_bits(bits: str, device: str | None = None) -> None:
    """Check that this machine can hold a backbone at ``bits``, without loading one or any large library.

    ``device`` is a torch device, None for the default one, which will do.

    Raises BackboneError: unknown bits, or bitsandbytes is not installed or cannot run on this device.
    """
    if bits not in BITS:
        raise BackboneError(f"unknown bits {bits!r}; choose one of {', '.join(BITS)}")
    if bits not in QUANTIZED:
        return
    if device is not None and device.split(":")[0] not in ("cuda", "cpu", "xpu"):
        raise BackboneError(f"bits={bits} does not run on device {device!r}; use bits=bf16")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise BackboneError(
            f"bits={bits} needs bitsandbytes, which is not installed; use bits=bf16"
        )


def import_bitsandbytes(bits: str) -> None:
    """Import what makes ``bits`` (BackboneError: it does not load here)."""
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:  # a broken native library raises anything
        raise BackboneError(
            f"bits={bits} needs bitsandbytes, which does not load here ({error}); use bits=bf16"
        ) from error


def free_gb(device: str) -> float:
    """GB (10^9 bytes) free on an accelerator now."""
    import torch

    return float(torch.cuda.mem_get_info(device)[0]) / 1e9


def needed_gb(
    source: str, directory: Path, formats: Iterable[str] | None = None
) -> dict[str, float]:
    """GB (10^9 bytes) a client needs at each of ``formats`` (:func:`candidates`): weights and working memory."""
    formats = candidates(source, directory) if formats is None else formats
    working = WORKING_GB * 1e9 + WORKING_SHARE * weight_bytes(source, directory, "bf16")
    return {bits: (weight_bytes(source, directory, bits) + working) / 1e9 for bits in formats}


def weight_bytes(source: str, directory: Path, bits: str) -> int:
    """Bytes of a backbone's weights at ``bits``, from its headers and configuration.

    Two-dimensional weights are quantized, but for embeddings and the unembedding: matrices with a
    row per vocabulary entry, or with the usual names.

    Raises BackboneError: the weights or the configuration are damaged.
    """
    tensors = tensor_headers(source, directory)
    try:
        config = parse_json((directory / "config.json").read_text())
        text = config.get("text_config") or config
        vocabulary = int(text["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BackboneError(
            f"config.json of backbone {source!r} does not describe a decoder ({error})"
        ) from error
    if config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)):
        tensors = [tensor for tensor in tensors if not tensor.name.startswith("lm_head.")]
    stored = stored_bits(source, directory)
    if stored is not None:
        return sum(_packed_bytes(tensor, bits, stored) for tensor in tensors)
    return sum(_bytes(tensor, bits, vocabulary) for tensor in _floating(tensors))


#: Ends of the names of what bitsandbytes keeps beside packed weights.
_BESIDE = (".absmax", "quant_map", ".SCB", ".nested_absmax", ".weight_format")


def _packed_bytes(tensor: TensorHeader, bits: str, stored: str) -> int:
    """Bytes of a tensor of a checkpoint quantized as ``stored``: as it is, or of the weights it stands for."""
    beside = tensor.name.endswith(_BESIDE) or ".quant_state." in tensor.name
    if bits == stored and (beside or tensor.dtype in ("U8", "I8")):
        return tensor.count * (1 if tensor.dtype in ("U8", "I8") else 4)
    if beside:
        return 0
    weights = tensor.count * (2 if tensor.dtype == "U8" else 1)
    return weights * (4 if bits == "fp32" else 2)


def _floating(tensors: Sequence[TensorHeader]) -> list[TensorHeader]:
    return [tensor for tensor in tensors if tensor.dtype.startswith(("F", "BF"))]


def is_quantizable(tensor: TensorHeader, vocabulary: int) -> bool:
    """Whether bitsandbytes replaces this weight: a linear layer that is no (un)embedding."""
    names = ("embed", "lm_head", "wte.", "wpe.")
    return (
        len(tensor.shape) == 2
        and tensor.name.endswith(".weight")
        and tensor.shape[0] != vocabulary
        and not any(name in tensor.name for name in names)
    )


def _bytes(tensor: TensorHeader, bits: str, vocabulary: int) -> int:
    count = tensor.count
    if bits == "fp32":
        return 4 * count
    if bits == "bf16" or not is_quantizable(tensor, vocabulary):
        return 2 * count
    if bits == "int8":
        return count + 4 * tensor.shape[0]
    blocks = -(-count // _BLOCK)
    scales = 4 * blocks if bits == "nf4-single" else blocks + 4 * -(-blocks // _NESTED_BLOCK)
    return -(-count // 2) + scales + _LAYER_BYTES[bits]
