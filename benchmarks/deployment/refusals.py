"""Who must not get into a deployment, tried on a real SuperLink: each case with the words it is refused with."""

from __future__ import annotations

import datetime
import shutil
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from benchmarks.deployment.lab import BIN, Lab
from benchmarks.deployment.tls_server import TlsServer
from heterotune_flwr.deploy import certificates
from heterotune_flwr.deploy.certificates import Pair
from heterotune_flwr.deploy.node_config import read_node_settings, supernode_command
from heterotune_flwr.federation.superlink import free_port

SECONDS = 180.0
#: Paths that must not pass the proxy, some of them in disguise.
CLOSED = (
    "/v1/control/start-run", "/v1/control/list-runs", "/v1/runtime/acquire-task", "/docs", "/openapi.json", "/health",
    "/v1/fleet/../control/start-run", "/v1/fleet/%2e%2e/control/start-run", "//v1/control/start-run",
)  # fmt: skip


def copied(lab: Lab, folder: Path, name: str, model: str) -> Path:
    """Copy a node's folder to ``folder/name``, with a runtime port of its own."""
    place = folder / name
    shutil.copytree(lab.deployment.node(model), place)
    text = (place / "node.toml").read_text()
    used = read_node_settings(place).port
    (place / "node.toml").write_text(text.replace(f"port = {used}", f"port = {free_port()}"))
    return place


def is_refused(lab: Lab, name: str, process: subprocess.Popen[bytes], words: str) -> bool:
    """Wait until the log of a process says why; the SuperNode may go on trying and is then ended."""
    deadline = time.monotonic() + SECONDS
    while words not in lab.log(name) and time.monotonic() < deadline:
        time.sleep(0.3)
    process.terminate()
    return words in lab.log(name)


def node_refusals(lab: Lab, folder: Path, model: str, stranger: str) -> dict[str, bool]:
    """Try to join as somebody who must not; case -> whether it was refused with the right words.

    Parameters
    ----------
    lab
        A laboratory whose server runs.
    folder
        For what is made.
    model
        A registered node, whose folder is copied.
    stranger
        A node whose key is not registered.

    """
    settings = read_node_settings(lab.deployment.node(model))
    started = {"unregistered key": (lab.start_node(stranger), "Failed to activate SuperNode")}
    wrong = copied(lab, folder, "wrong-ca", model)
    (wrong / "ca.crt").write_bytes(certificates.new_authority("somebody else").certificate)
    started["wrong CA"] = (lab.start("wrong CA", wrong / "start.sh"), "CERTIFICATE_VERIFY_FAILED")
    started["plain HTTP"] = (
        lab.start("plain HTTP", BIN / "flower-supernode", "--insecure", "--superlink", settings.address, "--port",
                  str(free_port())),
        # nginx says what is wrong; the SuperLink itself hangs up, and the node keeps trying.
        "Exit Code: 305" if lab.proxy else "Connection attempt failed",
    )  # fmt: skip
    command = supernode_command(read_node_settings(copied(lab, folder, "keyed", model)))
    trust = command.index("--root-certificates")
    without = [*command[:trust], "--insecure", *command[trust + 2 :]]
    started["key without TLS"] = (lab.start("key without TLS", *without), "TLS is not enabled")
    with TlsServer(_expired(lab), folder) as server:
        late = copied(lab, folder, "late", model)
        text = (late / "node.toml").read_text()
        (late / "node.toml").write_text(text.replace(settings.address, f"127.0.0.1:{server.port}"))
        process = lab.start("expired certificate", late / "start.sh")
        expired = is_refused(lab, "expired certificate", process, "certificate has expired")
    found = {
        case: is_refused(lab, stranger if case == "unregistered key" else case, process, words)
        for case, (process, words) in started.items()
    }
    return {**found, "expired certificate": expired}


def _expired(lab: Lab) -> Pair:
    folder = lab.deployment.folder / "ca"
    authority = Pair((folder / "ca.crt").read_bytes(), (folder / "ca.key").read_bytes())
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=9)
    return certificates.issue_server(authority, ["127.0.0.1"], 1, start=past)


def proxy_refusals(lab: Lab) -> dict[str, bool]:
    """Ask the proxy for every closed path; path -> whether it answered 403."""
    deployment = lab.deployment
    context = ssl.create_default_context(cafile=str(deployment.server / "ca.crt"))
    found = {}
    for path in CLOSED:
        url = f"https://127.0.0.1:{deployment.port}{path}"
        request = urllib.request.Request(url, b"", method="POST")
        try:
            with urllib.request.urlopen(request, timeout=10, context=context) as reply:
                status = reply.status
        except urllib.error.HTTPError as error:
            status = error.code
        found[path] = status == 403
    return found
