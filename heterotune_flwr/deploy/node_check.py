"""``heterotune node check``: everything that can be known about a node before it joins."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from heterotune_flwr.alignment.public_texts import SHIPPED
from heterotune_flwr.client.floors import Floors
from heterotune_flwr.client.holdout import held_size
from heterotune_flwr.client.identity import code_hash
from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.sources import examples_digest, how_read, read_examples
from heterotune_flwr.deploy import certificates
from heterotune_flwr.deploy.files import make_folder, present, read_bytes, unwritten
from heterotune_flwr.deploy.keys import key_fingerprint, public_of
from heterotune_flwr.deploy.layout import NODE_MANIFEST
from heterotune_flwr.deploy.node_config import (
    NodeSettings,
    check_ca,
    key_trouble,
    read_node_settings,
)
from heterotune_flwr.deploy.server_probe import Seen, look
from heterotune_flwr.deploy.versions import LIBRARIES, MISSING, installed_versions
from heterotune_flwr.errors import ConfigError, HeteroTuneError
from heterotune_flwr.jsons import parse_json
from heterotune_flwr.schema import AlignmentConfig, DataConfig

State = Literal["ok", "warn", "fail"]
#: Flower refuses a message signed more than 5 s in the server's future or 305 s in its past.
AHEAD, BEHIND, CLOSE = 4.0, 300.0, 2.0
WARN_DAYS = 30.0
DISK_GB = 1.0
#: Libraries that must agree to the letter: Flower's wire format is not stable between versions.
_EXACT = ("flwr",)


@dataclass(frozen=True)
class Finding:
    """One checked thing: how it stands, in a line, and how to mend it."""

    name: str
    state: State
    message: str
    mend: str = ""


def check_node(path: Path, offline: bool = False) -> list[Finding]:
    """Check a node's settings and machine; without ``offline`` also the way to its server."""
    try:
        settings = read_node_settings(path)
    except HeteroTuneError as error:
        return [Finding("settings", "fail", str(error))]
    findings = [
        Finding("settings", "ok", f"{settings.path}: client {settings.client['client-id']}")
    ]
    with _as_started(settings):
        parts = [_key, _port, _device, _backbone, _data, _anchors, _state_dir, _cache, _libraries]
        for part in (*parts, _ca if offline else _server):
            findings += _guarded(part, settings)
    return findings


def _guarded(
    part: Callable[[NodeSettings], Iterator[Finding]], settings: NodeSettings
) -> list[Finding]:
    found: list[Finding] = []
    try:
        found.extend(part(settings))
    except HeteroTuneError as error:
        found.append(Finding(part.__name__.strip("_").replace("_", " "), "fail", str(error)))
    return found


@contextmanager
def _as_started(settings: NodeSettings) -> Iterator[None]:
    """Give the environment that ``node start`` gives, for the length of the check."""
    before = dict(os.environ)
    os.environ.update(settings.environment())
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _key(settings: NodeSettings) -> Iterator[Finding]:
    trouble = key_trouble(settings)
    if trouble is not None:
        yield Finding("key", "fail", trouble)
        return
    line = public_of(settings.key, str(settings.client["client-id"]))
    yield Finding("key", "ok", f"{key_fingerprint(line)} (must be registered on the server)")


def _port(settings: NodeSettings) -> Iterator[Finding]:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", settings.port))
        except OSError:
            yield Finding(
                "port", "warn", f"port {settings.port} of this machine is taken",
                "by this node, if it runs already; otherwise set another port in [server] of node.toml",
            )  # fmt: skip


def _device(settings: NodeSettings) -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        yield Finding(
            "device", "ok",
            f"{torch.cuda.get_device_name()}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free",
        )  # fmt: skip
        return
    if settings.device not in (None, "cpu"):
        yield Finding(
            "device", "fail", f"device is {settings.device} but torch sees no GPU",
            "check nvidia-smi and that torch is a CUDA build, or set device = \"cpu\"",
        )  # fmt: skip
        return
    import psutil

    memory = psutil.virtual_memory()
    yield Finding(
        "device", "ok",
        f"CPU, {os.cpu_count()} cores, {memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free",
    )  # fmt: skip


def _budget(settings: NodeSettings) -> tuple[float, str]:
    """GB (10^9 bytes) the client may use, and whose number that is."""
    import psutil
    import torch

    given = settings.client.get("memory-gb")
    if given is not None:
        return float(given), "memory-gb"
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0]) / 1e9, "free on the GPU"
    return float(psutil.virtual_memory().available) / 1e9, "free memory"


def _backbone(settings: NodeSettings) -> Iterator[Finding]:
    from heterotune_flwr.backbones.bits import candidates, needed_gb, resolve_spec
    from heterotune_flwr.backbones.loading import check_bits
    from heterotune_flwr.backbones.quantized import check_stored_bits
    from heterotune_flwr.backbones.sources import AUTO, describe_source, resolve_source

    source, bits = str(settings.client["backbone"]), str(settings.client.get("bits", "bf16"))
    revision = settings.client.get("revision")
    shape = describe_source(source, revision)
    directory = resolve_source(source, revision)
    budget, whose = _budget(settings)
    if bits == AUTO:
        # The same choice that the client makes; it raises with the sizes when nothing fits.
        bits = resolve_spec(source, bits, revision, settings.client.get("memory-gb")).bits
        chosen = "auto is "
    else:
        check_bits(bits)
        check_stored_bits(source, directory, bits)
        chosen = ""
    what = f"{source}: {shape.layers} blocks of {shape.hidden}, {chosen}{bits}"
    needs = needed_gb(source, directory, dict.fromkeys((*candidates(source, directory), bits)))
    need = needs[bits]
    if need > budget:
        fitting = [known for known, size in needs.items() if size <= budget]
        yield Finding(
            "backbone", "fail", f"{what} needs {need:.2f} GB of {budget:.2f} GB ({whose})",
            f"set bits = \"{fitting[0]}\"" if fitting else "take a smaller backbone, or free memory",
        )  # fmt: skip
        return
    yield Finding("backbone", "ok", f"{what}, needs {need:.2f} GB of {budget:.2f} GB ({whose})")


def _data(settings: NodeSettings) -> Iterator[Finding]:
    client = settings.client
    data = DataConfig(
        format=client.get("format"),
        text_field=client.get("text-field", "text"),
        label_field=client.get("label-field", "label"),
        references_field=client.get("references-field", "references"),
    )
    for key in ("data", "test"):
        if client.get(key):
            present(Path(client[key]), key)  # says whose a closed folder is
    guest = client.get("guest") == "yes"
    if client.get("data"):
        path = Path(client["data"])
        examples, read = read_examples(path, data), how_read(path, data)
        yield _own_examples(examples, guest, read, settings.floors)
    else:
        yield Finding("data", "ok", "none: a guest, who learns from what the others predict")
    if client.get("test"):
        count, least = len(read_examples(Path(client["test"]), data)), settings.floors.test_examples
        few = count < least
        yield Finding(
            "test data", "warn" if few else "ok", f"{count} examples",
            f"nothing is told of fewer than {least} (test-examples in [floors])" if few else "",
        )  # fmt: skip


def _own_examples(
    examples: Sequence[Example], guest: bool, read: str | None, floors: Floors
) -> Finding:
    digest, count = examples_digest(examples)[:12], len(examples)
    few = not guest and count < floors.rows
    state: State = "warn" if few else "ok"
    mend = (
        f"a round needs at least {floors.rows} (round-examples and step-examples in [floors]): this node takes no part "
        'and keeps its bare model; guest = "yes" joins without training on them'
    ) if few else ""  # fmt: skip
    answers = len({example.label for example in examples})
    held = held_size(count, floors)
    use = f"; {held} of them held out for its own test" if held else "; no test of its own"
    if guest:
        use = "; a guest's, for its own test alone"
    text = f"{len(examples)} examples, {answers} different answers (digest {digest}){use}; they stay here"
    if read is not None:
        text += f"; {read}"
    return Finding("data", state, text, mend)


def _anchors(settings: NodeSettings) -> Iterator[Finding]:
    from heterotune_flwr.alignment.public_texts import load_anchors

    if given := settings.client.get("anchors"):
        if given not in SHIPPED and not present(Path(given), "the anchors"):
            yield Finding(
                "anchors", "fail", f"there is no file {given}", f"a file, or one of: {', '.join(SHIPPED)}"
            )  # fmt: skip
            return
        count = len(load_anchors(AlignmentConfig(anchors=given)))
        yield Finding("anchors", "ok", f"{count} anchors")


def _state_dir(settings: NodeSettings) -> Iterator[Finding]:
    yield from _written_folder("state dir", settings.state_dir)


def _cache(settings: NodeSettings) -> Iterator[Finding]:
    if "cache" in settings.client:
        yield from _written_folder("cache", Path(settings.client["cache"]))


def _written_folder(name: str, folder: Path) -> Iterator[Finding]:
    make_folder(folder)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free / 1e9
    except OSError as error:
        raise ConfigError(unwritten("folder", folder, error)) from error
    if free < DISK_GB:
        yield Finding(name, "fail", f"{folder} has {free:.2f} GB free", "make room on its disk")
    else:
        yield Finding(name, "ok", f"{folder} is writable, {free:.0f} GB free")


def _manifest(settings: NodeSettings) -> dict[str, Any] | None:
    """What the server has installed; None where the file is missing (ConfigError: it is damaged)."""
    path = settings.path.parent / NODE_MANIFEST
    if not present(path, NODE_MANIFEST):
        return None
    again = "copy it again from the server's node folder"
    try:
        found = parse_json(read_bytes(path, NODE_MANIFEST, again))
        if not isinstance(found.get("versions", {}), dict):
            raise ValueError("its versions are no table")
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged ({error}); {again}") from error
    return dict(found)


def _plain(version: str) -> str:
    """Drop the build from a version: 2.13.0+cu130 and 2.13.0+cpu agree."""
    return version.split("+")[0]


def _libraries(settings: NodeSettings) -> Iterator[Finding]:
    here, manifest = installed_versions(), _manifest(settings)
    shown = ", ".join(f"{name} {here[name]}" for name in LIBRARIES)
    if manifest is None:
        yield Finding(
            "libraries", "warn", shown,
            f"no {NODE_MANIFEST} beside node.toml to compare with: copy it from the server's node folder",
        )  # fmt: skip
        return
    # What the server does without, a node cannot differ from: a server needs no torch.
    theirs = {
        name: str(version)
        for name, version in manifest.get("versions", {}).items()
        if version != MISSING
    }
    missing = [name for name in LIBRARIES if here[name] == MISSING]
    other = [
        name
        for name in LIBRARIES
        if name in theirs and name not in missing and _plain(here[name]) != _plain(theirs[name])
    ]
    if missing or any(name in _EXACT for name in other):
        wanted = " ".join(
            f"{name}=={theirs[name]}" if name in theirs else name for name in [*missing, *other]
        )
        yield Finding(
            "libraries", "fail", shown, f"install the server's versions: pip install {wanted}"
        )
    elif other:
        differ = ", ".join(f"{name} {theirs[name]}" for name in other)
        yield Finding(
            "libraries", "warn", shown, f"the server has {differ}; results may differ a little"
        )
    else:
        yield Finding("libraries", "ok", shown)
    if manifest.get("code_hash") == code_hash():
        yield Finding("code", "ok", f"{code_hash()}, as on the server")
    else:
        yield Finding(
            "code", "fail" if settings.accept_code == "installed" else "warn",
            f"heterotune-flwr here has code {code_hash()}, the server {manifest.get('code_hash')} "
            f"(version {manifest.get('heterotune')})",
            "install the server's version here, or copy its new manifest.json if this machine's is the newer one",
        )  # fmt: skip


def _ca(settings: NodeSettings) -> Iterator[Finding]:
    check_ca(settings)
    yield from ()


def _server(settings: NodeSettings) -> Iterator[Finding]:
    seen = look(settings.host, settings.server_port, settings.ca, check_ca(settings))
    yield from _certificate(settings, seen)
    if seen.fleet == 0 or seen.fleet >= 500:
        yield Finding(
            "superlink", "fail",
            f"{settings.address} answers, but the SuperLink behind it does not (status {seen.fleet})",
            "tell the operator: start the SuperLink, look at its log and nginx's",
        )  # fmt: skip
    yield from _clock(seen)
    if seen.control not in (401, 403, 404):
        yield Finding(
            "proxy", "warn", f"{settings.address} answers control requests from outside (status {seen.control})",
            "tell the operator: only /v1/fleet/ should pass, as in the deployment's nginx.conf",
        )  # fmt: skip


def _certificate(settings: NodeSettings, seen: Seen) -> Iterator[Finding]:
    left = certificates.days_left(seen.certificate)
    what = f"{settings.address} is the server of {settings.ca.name}; its certificate is good for {left:.0f} days"
    if left < WARN_DAYS:
        yield Finding(
            "server", "warn", what, "on the server, in time: heterotune deploy init DIR --renew"
        )
    else:
        yield Finding("server", "ok", what)


def _clock(seen: Seen) -> Iterator[Finding]:
    ahead = seen.ahead
    mend = "set this machine's clock: timedatectl set-ntp true"
    if ahead is None:
        yield Finding(
            "clock", "warn", "the server does not tell its time", "compare `date` on both"
        )
    elif ahead > AHEAD or ahead < -BEHIND:
        side = "ahead of" if ahead > 0 else "behind"
        yield Finding(
            "clock",
            "fail",
            f"{abs(ahead):.0f} s {side} the server: it would refuse this node",
            mend,
        )
    elif abs(ahead) > CLOSE:
        yield Finding("clock", "warn", f"{ahead:+.0f} s against the server", mend)
    else:
        yield Finding("clock", "ok", "within 2 s of the server's")


def render(findings: Sequence[Finding]) -> str:
    """The findings as lines for a terminal, ending with the verdict."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:5} {finding.name:10} {finding.message}")
        if finding.mend:
            lines.append(f"{'':16} -> {finding.mend}")
    failed = sum(finding.state == "fail" for finding in findings)
    lines.append(
        "ready to join: heterotune node start" if not failed else f"not ready: {failed} to mend"
    )
    return "\n".join(lines)


def to_json(findings: Sequence[Finding]) -> str:
    """The findings as one JSON object: ``ready`` and ``checks``."""
    ready = all(finding.state != "fail" for finding in findings)
    return json.dumps({"ready": ready, "checks": [asdict(finding) for finding in findings]})
