"""The backbone store: weights in the format they are used in, made once per machine.

An entry is a directory ``<cache>/store/<bits>-<digest>/`` with a checkpoint that transformers
memory-maps on CPU, quantized weights included: worker processes that load it share one copy in the
page cache, and no process quantizes again. The digest covers the source's content, revision, bits
and every library whose version may change the format. Entries appear whole or not at all; one
that is damaged is made again from its source; where none can be kept (no space, read-only cache)
weights are loaded into each process's own memory as before, with one warning.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError

from heterotune_flwr.backbones.assets import cache_dir
from heterotune_flwr.backbones.bits import weight_bytes
from heterotune_flwr.backbones.headers import tensor_headers
from heterotune_flwr.backbones.manifest import (
    MANIFEST,
    damage,
    read_manifest,
    remember_checksums,
    whole_directory,
)
from heterotune_flwr.backbones.quantized import stored_bits
from heterotune_flwr.backbones.sources import QUANTIZED, BackboneSpec, fingerprint
from heterotune_flwr.errors import BackboneError, one_line

log = logging.getLogger(__name__)

#: Increase it when entries are written differently.
FORMAT = 1
_STORED = {"bf16": "BF16", "fp32": "F32"}


@dataclass(frozen=True)
class Loader:
    """How a model gets into memory.

    Attributes
    ----------
    direct
        Reads the source and quantizes it.
    stored
        Reads an entry of the store.
    parameters
        Counts the weights of a loaded model.

    """

    direct: Callable[[], Any]
    stored: Callable[[Path], Any]
    parameters: Callable[[Any], int]


def store_dir() -> Path:
    """Directory of all entries; it need not exist yet."""
    return cache_dir() / "store"


def libraries(bits: str) -> dict[str, str]:
    """Versions that may change what an entry of these bits holds."""
    major_minor = ".".join(version("transformers").split(".")[:2])
    found = {"transformers": major_minor}
    if bits in QUANTIZED:
        found["bitsandbytes"] = version("bitsandbytes")
    return found


def entry_dir(spec: BackboneSpec, source: Path, device: str) -> Path:
    """Directory of the entry for a source at a spec's bits; it need not exist.

    Quantized weights are those of the device that quantizes: kernels round differently.
    """
    made_on = device.split(":")[0] if spec.bits in QUANTIZED else None
    content = [FORMAT, fingerprint(source, spec.bits), spec.revision, spec.bits, made_on]
    text = json.dumps([*content, libraries(spec.bits)], sort_keys=True)
    return store_dir() / f"{spec.bits}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def used_in_place(spec: BackboneSpec, source: Path) -> bool:
    """Whether a source already has the format of its bits: it is then mapped where it lies."""
    if stored_bits(spec.source, source) is not None:
        return True
    wanted = _STORED.get(spec.bits)
    return wanted is not None and all(
        tensor.dtype == wanted for tensor in tensor_headers(spec.source, source)
    )


def shared_model(spec: BackboneSpec, source: Path, device: str, loader: Loader) -> Any:
    """Load a model so that all processes of this machine share its weights.

    ``source`` is the backbone as it was published. On an accelerator the store only spares the quantization.

    Raises BackboneError: the source is damaged.
    """
    if used_in_place(spec, source):
        return loader.direct()
    target = entry_dir(spec, source, device)
    for last in (False, True):
        model = _open(target, spec, loader)
        if model is None:
            model = _make(target, spec, source, device, loader, thorough=last)
        if model is not None:
            return model
    model = _open(target, spec, loader)
    if model is None:
        log.warning("%s: the store's %s cannot be used; loading without", spec.type_key, target)
        return loader.direct()
    return model


def shared_folder(spec: BackboneSpec, source: Path, device: str, loader: Loader) -> Path:
    """Folder of a backbone's entry, made if it is not there (BackboneError: none can be kept)."""
    target = entry_dir(spec, source, device)
    for last in (False, True):
        if target.is_dir() and damage(target) is None:
            return target
        _make(target, spec, source, device, loader, thorough=last)
    if damage(target) is None:
        return target
    raise BackboneError(
        f"no copy of {spec.type_key} can be kept in {target.parent}; free space there, or set HETEROTUNE_CACHE to a "
        "folder that can be written"
    )


def _open(target: Path, spec: BackboneSpec, loader: Loader) -> Any | None:
    """Load an entry; None where there is none that is whole."""
    if not target.is_dir():
        return None
    trouble = damage(target)
    if trouble is not None:
        log.warning("%s: stored copy in %s is damaged (%s)", spec.type_key, target, trouble)
        return None
    try:
        model = loader.stored(target)
    except Exception as error:  # removed meanwhile, or damaged since the checksum was remembered
        reason = one_line(error)
        log.warning("%s: stored copy in %s cannot be read (%s)", spec.type_key, target, reason)
        return None
    with contextlib.suppress(OSError):
        os.utime(target / MANIFEST)  # when it was last used
    return model


def _make(
    target: Path, spec: BackboneSpec, source: Path, device: str, loader: Loader, thorough: bool
) -> Any | None:
    """Make an entry unless another process just did; return the model if it could not be kept."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(lock_path(target))
        lock.acquire()
    except OSError as error:
        log.warning("%s: no store in %s (%s); every process loads a copy of its own",
                    spec.type_key, target.parent, error.strerror or error)  # fmt: skip
        return loader.direct()
    with lock:
        if target.is_dir() and damage(target, "full" if thorough else "remembered") is None:
            return None
        return _write_entry(target, spec, source, device, loader)


def lock_path(target: Path) -> Path:
    """Lock file of an entry; whoever makes or removes the entry holds it."""
    return target.with_name(f".{target.name}.lock")


def _write_entry(
    target: Path, spec: BackboneSpec, source: Path, device: str, loader: Loader
) -> Any | None:
    """Quantize into ``target`` while holding its lock; return the model if it could not be kept."""
    sweep(target)
    needed = weight_bytes(spec.source, source, spec.bits)
    free = shutil.disk_usage(target.parent).free
    log.info("%s: making the shared copy in %s, once", spec.type_key, target)
    model = loader.direct()
    try:
        if free < 1.02 * needed:
            raise OSError(f"{needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")
        facts = {
            "format": FORMAT,
            "name": spec.name,
            "source": spec.source,
            "revision": spec.revision,
            "type_key": spec.type_key,
            "bits": spec.bits,
            "fingerprint": fingerprint(source, spec.bits),
            "parameters": loader.parameters(model),
            "made_on": device.split(":")[0],
            "libraries": libraries(spec.bits),
        }
        with whole_directory(target, facts) as directory:
            model.save_pretrained(directory)
        remember_checksums(target)
    except (OSError, SafetensorError) as error:  # a full disk comes as either
        reason = one_line(error)
        log.warning("%s: no shared copy in %s (%s); every process loads a copy of its own",
                    spec.type_key, target.parent, reason)  # fmt: skip
        return model
    del model
    _return_memory()
    return None


def sweep(target: Path) -> int:
    """Remove what killed processes left of ``target`` (hold its lock); return the bytes freed."""
    freed = 0
    for rest in target.parent.glob(f".{target.name}.*"):
        if rest.is_dir():
            freed += bytes_in(rest)
            shutil.rmtree(rest, ignore_errors=True)
    return freed


def bytes_in(directory: Path) -> int:
    """Bytes of the files in an entry."""
    return sum(path.stat().st_size for path in directory.iterdir() if path.is_file())


def _return_memory() -> None:
    """Give the memory of the copy that was quantized back to the system, which malloc would keep."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def entries() -> list[Path]:
    """Directories of the store's entries, whole or damaged."""
    if not store_dir().is_dir():
        return []
    pattern = re.compile(r"[a-z0-9-]+-[0-9a-f]{16}")
    found = (path for path in store_dir().iterdir() if pattern.fullmatch(path.name))
    return sorted(path for path in found if path.is_dir())


def remove_entry(target: Path) -> int:
    """Remove an entry, also while others use it (they keep what they mapped); return its bytes.

    Raises BackboneError: the cache cannot be written.
    """
    try:
        with FileLock(lock_path(target)):
            freed = sweep(target)
            if target.is_dir():
                freed += bytes_in(target)
                gone = target.with_name(f".{target.name}.gone")
                os.replace(target, gone)  # vanishes at once, not file by file
                shutil.rmtree(gone)
    except OSError as error:
        raise BackboneError(f"{target} cannot be removed ({error.strerror or error})") from error
    return freed


def entry_facts(target: Path) -> dict[str, Any]:
    """Manifest of an entry; empty if it is damaged."""
    return read_manifest(target) or {}
