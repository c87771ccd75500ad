"""A real SuperLink with TLS and node authentication: who gets in, who does not, and what the refused are told."""

from __future__ import annotations

import pytest

from benchmarks.lab import Lab, has_nginx
from benchmarks.refusals import CLOSED, copied, is_refused, node_refusals, proxy_refusals
from heterotune_flwr.deploy.keys import new_node_key
from heterotune_flwr.deploy.node_check import check_node
from heterotune_flwr.deploy.registry import revoke, rotate_key


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with Lab(tmp_path_factory.mktemp("lab"), ["inside", "stranger"], proxy=has_nginx()) as lab:
        for name in ("inside", "stranger"):
            place = lab.configure(name, client_id=name)
            (place / "data.jsonl").write_text('{"text": "t", "label": "l"}\n' * 8)
        lab.deployment.nodes["stranger"].revoked = True  # so that its key is not registered
        lab.register()
        yield lab


def test_only_the_registered_key_over_tls_gets_in(lab, tmp_path):
    lab.start_node("inside")
    refused = node_refusals(lab, tmp_path, "inside", "stranger")
    assert len(refused) == 5
    assert all(refused.values()), (refused, lab.everything())
    lab.await_online({"inside"})
    findings = {finding.name: finding for finding in check_node(lab.deployment.node("inside"))}
    assert findings["server"].state == findings["clock"].state == "ok"
    assert findings["port"].state == "warn"  # the node itself has it
    open_to_all = "proxy" in findings  # without nginx the check warns of the control routes
    assert open_to_all != lab.proxy


def test_control_routes_do_not_pass_the_proxy(lab):
    if not lab.proxy:
        pytest.skip("no nginx")
    assert proxy_refusals(lab) == dict.fromkeys(CLOSED, True)


@pytest.mark.slow
def test_rotated_and_revoked_keys(lab, tmp_path):
    """A key is good until it is rotated or revoked, not longer; a running node ends then."""
    deployment = lab.deployment
    if "inside" not in lab.processes:
        lab.start_node("inside")
    lab.await_online({"inside"})
    old = copied(lab, tmp_path, "old-key", "inside")
    rotate_key(deployment, "inside", None)
    lab.processes["inside"].wait(180)  # Flower tells it at its next heartbeat
    lab.start_node("inside")
    again = lab.start("old-key", old / "start.sh")
    assert is_refused(lab, "old-key", again, "Failed to activate SuperNode")
    lab.await_online({"inside"})
    revoke(deployment, "inside")
    lab.processes["inside"].wait(180)
    barred = lab.start("barred", deployment.node("inside") / "start.sh")
    assert is_refused(lab, "barred", barred, "Failed to activate SuperNode")
    assert lab.online() == set()
    own = new_node_key(tmp_path / "own", "inside")
    rotate_key(deployment, "inside", own)
    assert not deployment.nodes["inside"].revoked
