"""A real SuperLink with TLS and node authentication: who gets in, who does not, and what the refused are told."""

from __future__ import annotations

import pytest

from benchmarks.deployment.lab import Lab, has_nginx
from benchmarks.deployment.refusals import CLOSED, copied, is_refused, node_refusals, proxy_refusals
from heterotune_flwr.deploy.keys import key_body, new_node_key, read_public
from heterotune_flwr.deploy.node_check import check_node
from heterotune_flwr.deploy.registry import listed, reconcile, revoke
from heterotune_flwr.deploy.rotation import rotate_key


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with Lab(tmp_path_factory.mktemp("lab"), ["inside", "stranger"], proxy=has_nginx()) as lab:
        for name in ("inside", "stranger"):
            place = lab.configure(name, client_id=name)
            (place / "data.jsonl").write_text('{"text": "t", "label": "l"}\n' * 8)
        lab.deployment.nodes["stranger"].revoked = True  # so that its key is not registered
        lab.register()
        yield lab


def test_flower_tells_which_keys_it_knows(lab, tmp_path):
    """Registrations are found by their keys; a rotation cut short is ended, and its old key can be barred."""
    deployment = lab.deployment
    inside = deployment.nodes["inside"]
    assert set(listed(deployment)) == inside.keys
    known = inside.node_id
    inside.node_id = None  # as when the answer to a registration was lost
    outcome = reconcile(deployment)
    assert (outcome.found, inside.node_id) == (["inside"], known)
    deployment.add_node("passing", read_public(new_node_key(tmp_path / "first", "passing")))
    assert reconcile(deployment).registered == ["passing"]
    passing = deployment.nodes["passing"]
    old, new = passing.public_key, read_public(new_node_key(tmp_path / "second", "passing"))
    passing.former, passing.public_key, passing.node_id = [old], new, None
    deployment.save()  # so far a rotation had come
    outcome = reconcile(deployment)
    assert (outcome.registered, outcome.barred) == (["passing"], ["passing"])
    revoke(deployment, "passing")
    live = {body for body, entry in listed(deployment).items() if entry.live}
    assert live == inside.keys
    assert {key_body(old), key_body(new)} <= set(listed(deployment)) - live


def test_only_the_registered_key_over_tls_gets_in(lab, tmp_path):
    lab.start_node("inside")
    refused = node_refusals(lab, tmp_path, "inside", "stranger")
    assert len(refused) == 5
    assert all(refused.values()), (refused, lab.everything())
    lab.await_online({"inside"})
    findings = {finding.name: finding for finding in check_node(lab.deployment.node("inside"))}
    assert findings["server"].state == findings["clock"].state == "ok"
    assert findings["port"].state == "warn"  # the node itself has it
    assert "superlink" not in findings  # the nodes' route is answered
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
