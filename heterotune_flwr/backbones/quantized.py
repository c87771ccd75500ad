"""Checkpoints that were quantized before they came here: what their ``config.json`` says (no torch here).

Those of bitsandbytes in a format that ``bits`` names are used as they are. Any other cannot be: weights that were
rounded once are not rounded again, and other libraries' layers carry no gradient here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from heterotune_flwr.errors import BackboneError

_KEYS = ("quantization_config", "compression_config")


def _declared(directory: Path) -> dict[str, Any] | None:
    """The quantization a configuration names, None where it names none or cannot be read."""
    try:
        config = json.loads((directory / "config.json").read_text())
        for part in (config, config.get("text_config") or {}):
            for key in _KEYS:
                if part.get(key):
                    return dict(part[key])
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return None


def _format(declared: dict[str, Any]) -> tuple[str | None, str]:
    """(``bits`` that stand for a quantization, None for none; what to call it)."""
    if declared.get("load_in_8bit"):
        return "int8", "bitsandbytes int8"
    if not declared.get("load_in_4bit"):
        return None, str(declared.get("quant_method", "an unknown format"))
    kind = str(declared.get("bnb_4bit_quant_type", "fp4"))
    storage = str(declared.get("bnb_4bit_quant_storage", "uint8"))
    if kind != "nf4" or storage != "uint8":
        packed = "" if storage == "uint8" else f" packed as {storage}"
        return None, f"bitsandbytes {kind}{packed}"
    bits = "nf4" if declared.get("bnb_4bit_use_double_quant") else "nf4-single"
    return bits, f"bitsandbytes {bits}"


def stored_bits(source: str, directory: Path) -> str | None:
    """Bits of a checkpoint that is quantized already; None for an ordinary one.

    ``source`` is its name in a configuration, for the error; ``config.json`` lies in ``directory``.

    Raises BackboneError: it is quantized in a format that no ``bits`` stands for.
    """
    declared = _declared(directory)
    if declared is None:
        return None
    bits, name = _format(declared)
    if bits is None:
        raise BackboneError(
            f"backbone {source!r} is a {name} checkpoint (config.json); of quantized checkpoints only those of "
            "bitsandbytes in nf4 or int8 can be trained through: give the unquantized one and choose bits"
        )
    return bits


def check_stored_bits(source: str, directory: Path, bits: str) -> None:
    """Check that a checkpoint can be had at ``bits`` (BackboneError: it is quantized already, in another format)."""
    stored = stored_bits(source, directory)
    if stored not in (None, bits):
        raise BackboneError(
            f"backbone {source!r} is quantized already, as {stored} (config.json), and cannot be had as {bits}: set "
            f"bits={stored} (or auto), or give the unquantized checkpoint"
        )
