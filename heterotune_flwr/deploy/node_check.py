"""``heterotune node check``: everything that can be known about a node before it joins."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from heterotune_flwr.deploy import machine_checks as machine
from heterotune_flwr.deploy import server_checks as server
from heterotune_flwr.deploy.findings import Finding
from heterotune_flwr.deploy.node_config import NodeSettings, read_node_settings
from heterotune_flwr.errors import HeteroTuneError

#: In the order in which they are shown; a part that raises has failed under its own name.
_PARTS = (
    machine.key, machine.port, machine.device, machine.backbone, machine.data, machine.anchors, machine.state_dir,
    machine.cache, server.libraries,
)  # fmt: skip


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
        for part in (*_PARTS, server.ca if offline else server.server):
            findings += guarded(part, settings)
    return findings


def guarded(
    part: Callable[[NodeSettings], Iterator[Finding]], settings: NodeSettings
) -> list[Finding]:
    """What one part finds; an error in it is a finding of its own."""
    found: list[Finding] = []
    try:
        found.extend(part(settings))
    except HeteroTuneError as error:
        found.append(Finding(part.__name__.replace("_", " "), "fail", str(error)))
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
