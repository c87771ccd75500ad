"""A real SuperLink with TLS and node authentication: who gets in, who does not, and what the refused are told."""

from __future__ import annotations

import datetime
import shutil
import subprocess
import time
import urllib.error
import urllib.request

import pytest
from test_deploy_check import TlsServer

from benchmarks.lab import BIN, Lab, has_nginx
from heterotune_flwr.deploy import certificates
from heterotune_flwr.deploy.keys import new_node_key
from heterotune_flwr.deploy.node_check import check_node
from heterotune_flwr.deploy.node_config import read_node_settings, supernode_command
from heterotune_flwr.deploy.registry import revoke, rotate_key
from heterotune_flwr.deploy.server_probe import look
from heterotune_flwr.federation.superlink import free_port


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with Lab(tmp_path_factory.mktemp("lab"), ["inside", "stranger"], proxy=has_nginx()) as lab:
        for name in ("inside", "stranger"):
            place = lab.configure(name, client_id=name)
            (place / "data.jsonl").write_text('{"text": "t", "label": "l"}\n' * 8)
        lab.deployment.nodes["stranger"].revoked = True  # so that its key is not registered
        lab.register()
        yield lab


def refused(lab, name, process, words, seconds=120):
    """Wait until the log says why; the SuperNode may go on trying."""
    deadline = time.monotonic() + seconds
    while words not in lab.log(name):
        assert time.monotonic() < deadline, f"{name} was not refused: {lab.log(name)}"
        time.sleep(0.3)
    process.terminate()


def copied(lab, tmp_path, name):
    place = tmp_path / name
    shutil.copytree(lab.deployment.node("inside"), place)
    text = (place / "node.toml").read_text()
    used = read_node_settings(place).port
    (place / "node.toml").write_text(text.replace(f"port = {used}", f"port = {free_port()}"))
    return place


def test_only_the_registered_key_over_tls_gets_in(lab, tmp_path):
    """All at once, because every SuperNode takes seconds to start."""
    lab.start_node("inside")
    stranger = lab.start_node("stranger")
    other = certificates.new_authority("somebody else")
    wrong_ca = copied(lab, tmp_path, "wrong-ca")
    (wrong_ca / "ca.crt").write_bytes(other.certificate)
    mistrusting = lab.start_node("wrong-ca", wrong_ca)
    settings = read_node_settings(lab.deployment.node("inside"))
    plain = lab.start(
        "plain", BIN / "flower-supernode", "--insecure", "--superlink", settings.address, "--port", str(free_port()),
    )  # fmt: skip
    command = supernode_command(read_node_settings(copied(lab, tmp_path, "keyed")))
    trust = command.index("--root-certificates")
    keyed = lab.start("keyed", *command[:trust], "--insecure", *command[trust + 2 :])
    authority = lab.deployment.folder / "ca"
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=9)
    pair = certificates.issue_server(
        certificates.Pair((authority / "ca.crt").read_bytes(), (authority / "ca.key").read_bytes()),
        ["127.0.0.1"], 1, start=past,
    )  # fmt: skip
    with TlsServer(pair, tmp_path) as server:
        late = copied(lab, tmp_path, "expired")
        text = (
            (late / "node.toml").read_text().replace(settings.address, f"127.0.0.1:{server.port}")
        )
        (late / "node.toml").write_text(text)
        expired = lab.start_node("expired", late)
        refused(lab, "expired", expired, "certificate has expired")
    refused(lab, "stranger", stranger, "Failed to activate SuperNode")
    refused(lab, "wrong-ca", mistrusting, "CERTIFICATE_VERIFY_FAILED")
    refused(lab, "keyed", keyed, "TLS is not enabled")
    lab.await_online({"inside"})
    refused(lab, "plain", plain, "Exit Code: 305")
    findings = {finding.name: finding for finding in check_node(settings.path)}
    assert findings["server"].state == findings["clock"].state == "ok"
    open_to_all = "proxy" in findings  # without nginx the check warns of the control routes
    assert open_to_all != lab.proxy


def test_control_routes_do_not_pass_the_proxy(lab):
    if not lab.proxy:
        pytest.skip("no nginx")
    deployment = lab.deployment
    seen = look("127.0.0.1", deployment.port, deployment.server / "ca.crt")
    assert seen.control == 403
    import ssl

    context = ssl.create_default_context(cafile=str(deployment.server / "ca.crt"))
    closed = ("/v1/control/start-run", "/v1/runtime/acquire-task", "/docs", "/openapi.json", "/health",
              "/v1/fleet/../control/start-run", "/v1/fleet/%2e%2e/control/x", "//v1/control/start-run")  # fmt: skip
    for path in closed:
        request = urllib.request.Request(
            f"https://127.0.0.1:{deployment.port}{path}", b"", method="POST"
        )
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=10, context=context)
        assert caught.value.code == 403, path
    plain = subprocess.run(
        ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", f"http://127.0.0.1:{deployment.port}/v1/fleet/get-run"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert plain.stdout in ("400", "")


@pytest.mark.slow
def test_rotated_and_revoked_keys(lab, tmp_path):
    """After the first test of this module: `inside` is online under its first key."""
    deployment = lab.deployment
    old = copied(lab, tmp_path, "old-key")
    rotate_key(deployment, "inside", None)
    lab.processes["inside"].wait(120)  # Flower tells it at its next heartbeat
    lab.start_node("inside")
    refused(lab, "old-key", lab.start_node("old-key", old), "Failed to activate SuperNode")
    lab.await_online({"inside"})
    own = new_node_key(tmp_path / "own", "inside")
    rotate_key(deployment, "inside", own)
    revoke(deployment, "inside")
    lab.processes["inside"].wait(120)
    refused(lab, "inside", lab.start_node("inside"), "Failed to activate SuperNode")
    assert lab.online() == set()
