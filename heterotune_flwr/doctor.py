"""``heterotune doctor``: whether this environment and this machine will do, before anything is started.

The checks of a deployed node stand in ``deploy/``, and with them what both need.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from heterotune_flwr.backbones.assets import DISTRIBUTION, cache_dir
from heterotune_flwr.backbones.bits import WORKING_GB
from heterotune_flwr.backbones.sources import EMBEDDED, is_present
from heterotune_flwr.client.node_keys import ServerTable
from heterotune_flwr.deploy.findings import Finding
from heterotune_flwr.deploy.hosts import Address
from heterotune_flwr.deploy.layout import INTERNAL_PORT
from heterotune_flwr.deploy.machine_checks import device_found, port_taken, written_folder
from heterotune_flwr.deploy.versions import LIBRARIES, MISSING, installed_versions
from heterotune_flwr.errors import HeteroTuneError, one_line
from heterotune_flwr.federation.superlink import free_port
from heterotune_flwr.programs import program
from heterotune_flwr.schema import RUNS_FOLDER

#: What Flower, Ray and a run's server take beside its workers [GB].
_SERVER_GB = 1.0
#: A part of the cache that is not worth a word [GB].
_SMALL_GB = 0.01
#: Where an NVIDIA driver says that it is loaded.
_NVIDIA = Path("/proc/driver/nvidia/version")


def examine() -> list[Finding]:
    """Every finding, in the order in which they are shown; a check that raises has failed under its own name."""
    found: list[Finding] = []
    for check in _CHECKS:
        try:
            found.extend(check())
        except HeteroTuneError as error:
            found.append(Finding(check.__name__.strip("_"), "fail", str(error)))
    return found


def _python() -> Iterator[Finding]:
    """The interpreter, against what the package asks for."""
    here, wanted = platform.python_version(), metadata.metadata(DISTRIBUTION)["Requires-Python"]
    if SpecifierSet(wanted).contains(here, prereleases=True):
        yield Finding("python", "ok", f"{here} ({wanted})")
    else:
        mend = "make an environment of another Python: python3.11 -m venv .venv"
        yield Finding("python", "fail", f"{here}, but {wanted} is needed", mend)


def needed() -> list[Requirement]:
    """What the package needs without any extra, and what of Flower's extra ``simulation`` it asks for."""
    own = _needs(DISTRIBUTION)
    further = (one for need in own for extra in need.extras for one in _needs(need.name, extra))
    return [*own, *further]


def _needs(name: str, extra: str = "") -> list[Requirement]:
    """What a distribution needs always, or besides that for an extra; nothing of one that is not here."""
    try:
        lines = [Requirement(line) for line in metadata.requires(name) or []]
    except metadata.PackageNotFoundError:
        return []
    found = [need for need in lines if _applies(need, extra)]
    return [need for need in found if not _applies(need, "")] if extra else found


def _applies(need: Requirement, extra: str) -> bool:
    return need.marker is None or need.marker.evaluate({"extra": extra})


def _libraries() -> Iterator[Finding]:
    """Every library that is needed: there, and of a version that is supported."""
    needs = needed()
    here = installed_versions(need.name for need in needs)
    wrong = [
        need
        for need in needs
        if here[need.name] == MISSING
        or not need.specifier.contains(here[need.name], prereleases=True)
    ]
    shown = ", ".join(f"{name} {here[name]}" for name in LIBRARIES if name in here)
    if not wrong:
        yield Finding("libraries", "ok", f"{shown}; all {len(needs)} that are needed fit")
        return
    yield Finding("libraries", "warn", shown)
    for need in wrong:
        wanted = f"{need.name}{need.specifier}"
        state = "is missing" if here[need.name] == MISSING else f"is {here[need.name]}"
        text = f"{state}; {need.specifier or 'any version'} is supported"
        yield Finding(need.name, "fail", text, f'pip install "{wanted}"')


def _flower() -> Iterator[Finding]:
    """Flower's programs, which simulations and nodes start."""
    for name in ("flwr", "flower-superlink", "flower-superexec", "flower-supernode"):
        program(name)  # raises where there is none, and says how to mend it
    yield Finding("flower", "ok", f"its programs are in {Path(program('flwr')).parent}")


def _device() -> Iterator[Finding]:
    """What is computed on; a GPU that torch cannot see."""
    try:
        found = list(device_found(None))
    except (
        ImportError,
        OSError,
        RuntimeError,
    ) as error:  # a build of torch that does not fit the machine
        reason = one_line(error)
        yield Finding("device", "fail", f"torch cannot be used: {reason}", "install torch anew")
        return
    if found[0].message.startswith("CPU") and (_NVIDIA.exists() or shutil.which("nvidia-smi")):
        text = f"{found[0].message}; there is an NVIDIA driver, but torch sees no GPU"
        mend = "look at nvidia-smi; a CPU build of torch (+cpu) knows no GPU: pip install --force-reinstall torch"
        yield Finding("device", "warn", text, mend)
        return
    yield from found


def _memory() -> Iterator[Finding]:
    """Memory for as many workers as there are cores."""
    import psutil

    free, cores = psutil.virtual_memory().available / 1e9, os.cpu_count() or 1
    need = _SERVER_GB + WORKING_GB * cores
    text = f"{free:.1f} GB free; {cores} workers, one a core, and the server take {need:.1f} GB without models"
    mend = "run fewer workers: heterotune run demo run.workers=1" if free < need else ""
    yield Finding("memory", "warn" if mend else "ok", text, mend)


def _folders() -> Iterator[Finding]:
    """Where is written: the cache, runs, and what programs keep for a while."""
    places = {
        "cache": (cache_dir(), "set HETEROTUNE_CACHE to a folder elsewhere"),
        "runs": (Path(RUNS_FOLDER).expanduser(), "name another folder: heterotune run ... --dir"),
        "temporary": (Path(tempfile.gettempdir()), "set TMPDIR to a folder elsewhere"),
    }
    for name, (folder, mend) in places.items():
        there = next(place for place in (folder, *folder.parents) if place.is_dir())
        try:
            yield from written_folder(name, there)
        except HeteroTuneError as error:
            yield Finding(name, "fail", str(error), mend)


def _kept() -> Iterator[Finding]:
    """What the cache holds, by kind."""
    root = cache_dir()
    kinds = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    sizes = {
        kind.name: sum(path.stat().st_size for path in kind.rglob("*") if path.is_file()) / 1e9
        for kind in kinds
    }
    told = ", ".join(f"{name} {size:.2f} GB" for name, size in sizes.items() if size > _SMALL_GB)
    text = f"{sum(sizes.values()):.2f} GB in the cache" + (f": {told}" if told else "")
    full = bool(sizes) and sum(sizes.values()) > shutil.disk_usage(root).free / 1e9
    mend = "more than its disk has left: heterotune states --clear, heterotune backbones prune"
    yield Finding("kept", "warn" if full else "ok", text, mend if full else "")


def _models() -> Iterator[Finding]:
    """The embedded backbones, which the demonstration runs on."""
    gone = [name for name in EMBEDDED if not is_present(name)]
    if gone:
        mend = f"install {DISTRIBUTION} anew: its data files are incomplete"
        yield Finding("models", "fail", f"{', '.join(gone)} are not installed", mend)
    else:
        yield Finding("models", "ok", f"{', '.join(EMBEDDED)} are here")


def _ports() -> Iterator[Finding]:
    """The loopback interface, on which a simulation takes free ports, and the ports of a deployment."""
    try:
        free_port()
    except OSError as error:
        mend = "bring the loopback interface up: ip link set lo up"
        yield Finding("ports", "fail", f"127.0.0.1 takes no port: {error.strerror or error}", mend)
        return
    whose = {
        Address("").port: "nginx of a server",
        INTERNAL_PORT: "SuperLink of a server",
        ServerTable.port: "a node",
    }
    taken = [f"{number} ({what})" for number, what in whose.items() if port_taken(number)]
    if taken:
        text = f"a simulation finds free ones; of a deployment's are taken: {', '.join(taken)}"
        mend = "by the deployment itself, if it runs; else choose others: heterotune deploy init --help"
        yield Finding("ports", "warn", text, mend)
    else:
        yield Finding("ports", "ok", f"free ones are found; {', '.join(map(str, whose))} are free")


_CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _python, _libraries, _flower, _device, _memory, _folders, _kept, _models, _ports,
)  # fmt: skip
