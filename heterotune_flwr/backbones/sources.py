"""From a backbone's name in a configuration to a directory with its weights (no torch here).

A name is, in this order: a member of the embedded family, a fetched backbone
(``heterotune fetch``), a local directory, a GGUF file, or a hub id ``owner/name``.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heterotune_flwr.backbones.assets import asset_path, cache_dir
from heterotune_flwr.backbones.files import file_digest, has_weights
from heterotune_flwr.errors import BackboneError, one_line
from heterotune_flwr.jsons import parse_json
from heterotune_flwr.names import as_id
from heterotune_flwr.plugins import load_plugin, plugin_names
from heterotune_flwr.schema import BITS

#: The shipped family, smallest first.
EMBEDDED = ("tiny-a", "tiny-b", "tiny-c")
#: Backbones that ``heterotune fetch`` puts into the cache (see :mod:`.fetch`).
FETCHABLE = ("smollm2", "gemma3-270m", "smollm2-pruned")
#: Those that bitsandbytes makes.
QUANTIZED = ("nf4", "nf4-single", "int8")

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ("*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt")


def short_name(source: str) -> str:
    """The last part of a path or hub id."""
    return Path(source.rstrip("/")).name.removesuffix(".gguf")


def type_key(source: str, bits: str, revision: str | None = None) -> str:
    """Identity of a model type, ``name[#revision]@bits``, an id whatever the names are (:mod:`..names`)."""
    return as_id(f"{short_name(source)}{f'#{revision}' if revision else ''}@{bits}")


@dataclass(frozen=True)
class BackboneSpec:
    """A backbone at a revision and bit width: what makes a model type."""

    source: str
    bits: str = "bf16"
    revision: str | None = None

    def __post_init__(self) -> None:
        """Check the bit width."""
        if self.bits not in BITS:
            raise BackboneError(
                f"bits of {self.source} is {self.bits!r}; choose one of {', '.join(BITS)}"
            )

    @property
    def name(self) -> str:
        """Short name: the last part of a path or hub id."""
        return short_name(self.source)

    @property
    def type_key(self) -> str:
        """Identity of the model type (:func:`type_key`)."""
        return type_key(self.source, self.bits, self.revision)


@dataclass(frozen=True)
class Shape:
    """What a backbone's configuration says: d, number of decoder blocks, vocabulary size, longest sequence if told."""

    hidden: int
    layers: int
    vocabulary: int
    family: str = ""
    positions: int | None = None


def fetched_dir(name: str) -> Path:
    """Directory of the fetched backbone ``name`` in the cache; it need not exist."""
    return cache_dir() / "backbones" / name


def _embedded_dir(name: str) -> Path | None:
    found = asset_path(f"embedded/{name}/model.safetensors")
    return found.parent if found else None


def is_present(name: str) -> bool:
    """Whether the weights of an embedded or fetchable backbone are on this machine."""
    if name in EMBEDDED:
        return _embedded_dir(name) is not None
    return has_weights(fetched_dir(name))


def unknown_backbone(source: str) -> BackboneError:
    """Return the error for a name nobody knows, with the nearest name that exists."""
    known = (*EMBEDDED, *FETCHABLE)
    near = difflib.get_close_matches(source, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return BackboneError(
        f"unknown backbone {source!r}{hint} (known: {', '.join(known)}; or a directory, a .gguf "
        "file, a hub id owner/name)"
    )


def _hub_dir(source: str, revision: str | None, config_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["config.json"] if config_only else list(_HUB_FILES)
    options: dict[str, Any] = {"revision": revision, "allow_patterns": patterns}
    try:
        directory = Path(snapshot_download(source, local_files_only=True, **options))
        if config_only or has_weights(directory):
            return directory
    except Exception:  # not in the hub's cache; the reasons are many and none matters
        pass
    try:
        return Path(snapshot_download(source, **options))
    except Exception as error:
        reason = one_line(error, 160)
        raise BackboneError(
            f"backbone {source!r} could not be read from the hub ({type(error).__name__}: "
            f"{reason}); download it elsewhere and give its local directory"
        ) from error


def resolve_source(source: str, revision: str | None = None, config_only: bool = False) -> Path:
    """Directory with ``config.json``, tokenizer and weights of a backbone.

    A GGUF file is converted once, into the cache. ``config_only`` may leave the weights of a hub
    id where they are.

    Raises BackboneError: nothing of that name exists (the nearest known name is suggested), or its weights are not here
    and cannot be brought.
    """
    if source in EMBEDDED:
        found = _embedded_dir(source)
        if found is None:
            raise BackboneError(
                f"the weights of embedded backbone {source!r} are not installed here; install "
                "heterotune-flwr into this environment or set HETEROTUNE_ASSETS"
            )
        return found
    if source in FETCHABLE:
        if not is_present(source):
            raise BackboneError(
                f"backbone {source!r} is not here yet; run: heterotune fetch {source}"
            )
        return fetched_dir(source)
    if source in plugin_names("backbones"):
        return _plugin_dir(source)
    path = Path(source).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        from heterotune_flwr.backbones.conversion import converted_gguf

        return converted_gguf(path)
    if (path / "config.json").is_file():
        return path
    if path.exists():
        raise BackboneError(
            f"backbone {source!r} is neither a .gguf file nor a directory with config.json"
        )
    if _HUB_ID.fullmatch(source):
        return _hub_dir(source, revision, config_only)
    raise unknown_backbone(source)


def _plugin_dir(source: str) -> Path:
    """Folder of a backbone that an installed package brings: its entry point is a function that returns it."""
    try:
        found = Path(load_plugin("backbones", source)())
    except Exception as error:  # another package's code
        raise BackboneError(f"backbone {source!r} of an installed package: {error}") from error
    if not (found / "config.json").is_file():
        raise BackboneError(
            f"backbone {source!r} of an installed package: {found} has no config.json"
        )
    return found


def _describe_gguf(path: Path) -> Shape:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        family = str(reader.get_field("general.architecture").contents())
        hidden = int(reader.get_field(f"{family}.embedding_length").contents())
        layers = int(reader.get_field(f"{family}.block_count").contents())
        vocabulary = len(reader.get_field("tokenizer.ggml.tokens").data)
    except (AttributeError, ValueError, OSError) as error:
        raise BackboneError(f"{str(path)!r} is not a readable GGUF model: {error}") from error
    return Shape(hidden, layers, vocabulary, family)


def describe_source(source: str, revision: str | None = None) -> Shape:
    """Width, depth and vocabulary of a backbone from its configuration (or GGUF header) alone.

    Raises BackboneError: the source cannot be resolved, or its configuration does not describe a decoder.
    """
    path = Path(source).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return _describe_gguf(path)
    directory = resolve_source(source, revision, config_only=True)
    try:
        config = parse_json((directory / "config.json").read_text())
        _check_decoder(source, config)
        config = config.get("text_config") or config
        most = config.get("max_position_embeddings") or config.get("n_positions")
        return Shape(
            hidden=int(config.get("hidden_size") or config["n_embd"]),
            layers=int(config.get("num_hidden_layers") or config["n_layer"]),
            vocabulary=int(config["vocab_size"]),
            family=str(config.get("model_type", "")),
            positions=int(most) if most else None,
        )
    except KeyError as error:
        raise BackboneError(
            f"config.json of backbone {source!r} does not describe a decoder (no {error.args[0]!r})"
        ) from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BackboneError(
            f"config.json of backbone {source!r} does not describe a decoder ({error})"
        ) from error


def _check_decoder(source: str, config: Mapping[str, Any]) -> None:
    """Refuse encoders, and families that transformers knows only by code from the model's own folder."""
    from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES

    family = str(config.get("model_type", ""))
    heads = ", ".join(map(str, config.get("architectures") or ()))
    if config.get("is_encoder_decoder") or "ForMaskedLM" in heads:
        raise BackboneError(
            f"backbone {source!r} is {heads or family}, an encoder: decoder-only language models alone are trained here"
        )
    if family and family not in CONFIG_MAPPING_NAMES:
        raise BackboneError(
            f"backbone {source!r} is of a family that transformers does not know ({family!r}); code that comes with a "
            "model is never run here"
        )


def fingerprint(directory: Path, bits: str) -> str:
    """SHA-256 (16 hex digits) over a backbone's configuration, tokenizer, chat template, weights and bits.

    Digests of files are remembered in the cache by (path, size, time of change).
    """
    paths = sorted(
        path
        for path in directory.iterdir()
        if path.suffix == ".safetensors"
        or path.name in ("config.json", "tokenizer.json", "chat_template.jinja")
        or (path.name == "tokenizer_config.json" and b'"chat_template"' in path.read_bytes())
    )
    if not any(path.suffix == ".safetensors" for path in paths):
        raise BackboneError(f"backbone directory {str(directory)!r} has no .safetensors weights")
    digest = hashlib.sha256(f"{bits}\n".encode())
    for path in paths:
        digest.update(f"{path.name}:{file_digest(path)}\n".encode())
    return digest.hexdigest()[:16]
