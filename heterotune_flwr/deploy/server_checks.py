"""Whether a node fits its server: libraries and code, the way there, certificate and clock."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from heterotune_flwr.deploy import certificates
from heterotune_flwr.deploy.files import present, read_bytes
from heterotune_flwr.deploy.findings import Finding, State
from heterotune_flwr.deploy.layout import NODE_MANIFEST
from heterotune_flwr.deploy.node_config import NodeSettings, check_ca
from heterotune_flwr.deploy.server_probe import Seen, look
from heterotune_flwr.deploy.versions import LIBRARIES, MISSING, installed_versions
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.jsons import parse_json
from heterotune_flwr.program_version import code_hash

#: Flower refuses a message signed more than 5 s in the server's future or 305 s in its past.
AHEAD, BEHIND, CLOSE = 4.0, 300.0, 2.0
WARN_DAYS = 30.0
#: Libraries that must agree to the letter: Flower's wire format is not stable between versions.
_EXACT = ("flwr",)


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


def libraries(settings: NodeSettings) -> Iterator[Finding]:
    """Libraries and code, against what the server has."""
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
    state: State = "ok"
    mend = ""
    if missing or any(name in _EXACT for name in other):
        wanted = " ".join(f"{n}=={theirs[n]}" if n in theirs else n for n in [*missing, *other])
        state, mend = "fail", f"install the server's versions: pip install {wanted}"
    elif other:
        differ = ", ".join(f"{name} {theirs[name]}" for name in other)
        state, mend = "warn", f"the server has {differ}; results may differ a little"
    yield Finding("libraries", state, shown, mend)
    if manifest.get("code_hash") == code_hash():
        yield Finding("code", "ok", f"{code_hash()}, as on the server")
    else:
        yield Finding(
            "code", "fail" if settings.accept_code == "installed" else "warn",
            f"heterotune-flwr here has code {code_hash()}, the server {manifest.get('code_hash')} "
            f"(version {manifest.get('heterotune')})",
            "install the server's version here, or copy its new manifest.json if this machine's is the newer one",
        )  # fmt: skip


def ca(settings: NodeSettings) -> Iterator[Finding]:
    """The CA certificate (ConfigError), where nobody looks at the server."""
    check_ca(settings)
    yield from ()


def server(settings: NodeSettings) -> Iterator[Finding]:
    """The server itself: who it is, what it lets through, its clock."""
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
    late = left < WARN_DAYS
    mend = "on the server, in time: heterotune deploy init DIR --renew" if late else ""
    yield Finding("server", "warn" if late else "ok", what, mend)


def _clock(seen: Seen) -> Iterator[Finding]:
    ahead, mend = seen.ahead, "set this machine's clock: timedatectl set-ntp true"
    if ahead is None:
        text = "the server does not tell its time"
        yield Finding("clock", "warn", text, "compare `date` on both")
    elif ahead > AHEAD or ahead < -BEHIND:
        side = "ahead of" if ahead > 0 else "behind"
        text = f"{abs(ahead):.0f} s {side} the server: it would refuse this node"
        yield Finding("clock", "fail", text, mend)
    elif abs(ahead) > CLOSE:
        yield Finding("clock", "warn", f"{ahead:+.0f} s against the server", mend)
    else:
        yield Finding("clock", "ok", "within 2 s of the server's")
