"""Finds a backbone again for somebody else's loader: a folder that ``from_pretrained`` reads without being told more.

Bits and dtype are those of the folder's own ``config.json``: the source itself where it says them, else an entry of the
store (:mod:`.store`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from heterotune_flwr.backbones.bits import check_bits, default_device
from heterotune_flwr.backbones.loading import checked_source, loader_of, prepare_libraries
from heterotune_flwr.backbones.quantized import stored_bits
from heterotune_flwr.backbones.sources import BackboneSpec, fingerprint
from heterotune_flwr.backbones.store import shared_folder, used_in_place
from heterotune_flwr.errors import BackboneError
from heterotune_flwr.jsons import parse_json

_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def prepared_folder(spec: BackboneSpec, device: str | None = None) -> Path:
    """Folder of a backbone at its bits; makes it once, where it has to be made.

    Raises BackboneError: the backbone is not here and cannot be brought, or not at these bits.
    """
    device = device or default_device()
    check_bits(spec.bits, device)
    prepare_libraries(spec.bits)
    source = checked_source(spec)
    if used_in_place(spec, source) and _says_its_dtype(spec, source):
        return source
    return shared_folder(spec, source, device, loader_of(spec, source, device))


def _says_its_dtype(spec: BackboneSpec, source: Path) -> bool:
    """Whether transformers, told nothing, takes the dtype that a backbone is used in here."""
    if stored_bits(spec.source, source) is not None:
        return False  # another compute dtype may stand in it
    config = parse_json((source / "config.json").read_text())
    found = [
        part.get("dtype") or part.get("torch_dtype")
        for part in (config.get("text_config") or {}, config)
    ]
    return all(dtype in (None, _DTYPES[spec.bits]) for dtype in found) and any(found)


def found_again(backbone: Mapping[str, str | None]) -> str:
    """Folder of the backbone that an adapter names (``source``, ``revision``, ``bits``, ``fingerprint``).

    Raises BackboneError: it is not here and cannot be brought, or is another one than the adapter was made for.
    """
    spec = BackboneSpec(
        str(backbone["source"]), str(backbone["bits"]), backbone.get("revision") or None
    )
    wanted = backbone.get("fingerprint")
    found = fingerprint(checked_source(spec), spec.bits)
    if wanted and found != wanted:
        raise BackboneError(
            f"backbone {spec.source!r} is not the one this adapter was made for (fingerprint {found}, not {wanted}): "
            "its weights, tokenizer or configuration have changed; bring the old ones back, or name another source in "
            "the adapter's adapter_config.json"
        )
    return str(prepared_folder(spec))
