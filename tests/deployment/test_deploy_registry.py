"""Who is let in: whatever was cut short or done elsewhere, no key stays good that should not."""

from __future__ import annotations

import os
import re
import subprocess

import pytest
from fake_flower import FakeFlower, Killed
from typer.testing import CliRunner

from heterotune_flwr.cli import app
from heterotune_flwr.deploy.folder import initialise
from heterotune_flwr.deploy.keys import key_body, new_node_key, public_of, read_public
from heterotune_flwr.deploy.layout import Deployment
from heterotune_flwr.deploy.registry import Listed, flwr, reconcile, revoke
from heterotune_flwr.deploy.rotation import rotate_key
from heterotune_flwr.errors import ConfigError, FederationError


@pytest.fixture
def flower(monkeypatch):
    fake = FakeFlower()
    fake.install(monkeypatch)
    save, replace = Deployment.save, os.replace

    def counted(call):
        def step(*arguments):
            fake.step()
            return call(*arguments)

        return step

    monkeypatch.setattr(Deployment, "save", counted(save))
    monkeypatch.setattr(os, "replace", counted(replace))
    return fake


@pytest.fixture
def lab(flower, tmp_path):
    deployment = initialise(tmp_path / "lab", ["h.org"], ["n1", "n2"], {}, 90, False)
    reconcile(deployment)
    return deployment


def again(lab):
    """The deployment as the next command finds it."""
    return Deployment.load(lab.folder)


def secrets(lab, name):
    """Bodies of the private keys that lie in a node's folder here."""
    return {key_body(public_of(path, name)) for path in lab.node(name).glob("*.key*")}


def run(*arguments):
    return CliRunner().invoke(app, ["deploy", *map(str, arguments)])


def kills(flower, command, lab, own):
    """Kill a command at every of its steps in turn; yields after each, until it comes to its end."""
    for at in range(1, 30):
        for after in (False, True):
            here = again(lab)
            flower.restart(at, after)
            try:
                command(here, own)
            except Killed:
                flower.restart()
                yield
            else:
                flower.restart()
                return
    raise AssertionError("it never ends")


@pytest.mark.parametrize("own_key", [False, True])
@pytest.mark.parametrize("mend", ["register", "revoke", "rotate again"])
def test_a_rotation_cut_anywhere_leaves_no_key_that_is_unknown_or_cannot_be_barred(
    lab, flower, tmp_path, own_key, mend
):
    made = 0

    def rotate(here, _):
        nonlocal made
        made += 1
        own = new_node_key(tmp_path / f"own{made}", "n1") if own_key else None
        rotate_key(here, "n1", own)

    cuts = 0
    for _ in kills(flower, rotate, lab, None):
        cuts += 1
        here = again(lab)
        known = {body for node in here.nodes.values() for body in node.keys}
        assert flower.live() <= known
        if mend == "register":
            reconcile(here)
        elif mend == "revoke":
            revoke(here, "n1")
            assert flower.live() == here.nodes["n2"].keys
        else:
            rotate(here, None)
        here = again(lab)
        n1 = here.nodes["n1"]
        assert n1.revoked == (mend == "revoke")
        expected = set() if n1.revoked else {key_body(n1.public_key)}
        assert flower.live() == expected | here.nodes["n2"].keys
        if mend != "revoke" and not own_key:
            assert secrets(here, "n1") == expected  # and no other private key stays on the server
    assert cuts > 5


def test_a_rotation_without_the_superlink_changes_nothing(lab, flower):
    flower.on = False
    before = again(lab)
    with pytest.raises(FederationError):
        rotate_key(again(lab), "n1", None)
    assert again(lab) == before
    assert secrets(lab, "n1") == {key_body(before.nodes["n1"].public_key)}
    flower.on = True
    revoke(again(lab), "n1")
    assert flower.live() == before.nodes["n2"].keys


def test_a_key_barred_for_a_node_does_not_come_back(lab, flower, tmp_path):
    old = lab.nodes["n1"].public_key
    rotate_key(lab, "n1", None)
    (tmp_path / "old.pub").write_text(old)
    with pytest.raises(ConfigError, match="has, or had, already"):
        rotate_key(again(lab), "n1", tmp_path / "old.pub")
    with pytest.raises(ConfigError, match="every node needs its own"):
        again(lab).add_node("n3", old)
    # The SuperLink's database is put back from a backup of before.
    flower.keys = {key_body(old): Listed("7", True)}
    assert reconcile(again(lab)).barred == ["n1"]
    assert key_body(old) not in flower.live()


def test_a_key_left_by_an_older_version_is_removed_when_it_is_barred(lab):
    folder = lab.node("n1")
    rotate_key(lab, "n1", None)
    before = again(lab).nodes["n1"].public_key
    (folder / "node.key").rename(folder / "node.key.old")
    rotate_key(again(lab), "n1", None)
    left = secrets(lab, "n1")
    assert left == {key_body(again(lab).nodes["n1"].public_key)} != {key_body(before)}


def test_a_registration_whose_answer_was_lost_is_taken_up(lab, flower):
    ids = {name: node.node_id for name, node in lab.nodes.items()}
    lab.nodes["n1"].node_id = None
    lab.save()
    lab.add_node("n3")
    lab.save()
    done = run("register", lab.folder)
    assert done.exit_code == 0, done.output
    assert f"n1 was registered already, node id {ids['n1']}" in done.output
    assert "registered n3" in done.output  # what comes after it is not held up
    assert again(lab).nodes["n1"].node_id == ids["n1"]
    assert len(flower.live()) == 3


def test_a_node_that_was_unregistered_with_flwr_becomes_a_revoked_one(lab, flower):
    flower.flwr(None, "supernode", "unregister", lab.nodes["n1"].node_id)
    flower.flwr(None, "supernode", "unregister", lab.nodes["n2"].node_id)
    revoke(again(lab), "n1")
    assert again(lab).nodes["n1"].revoked
    done = run("register", lab.folder)
    assert "the key of n2 has been barred with flwr" in done.output
    assert again(lab).nodes["n2"].revoked
    assert "every" not in done.output
    rotate_key(again(lab), "n2", None)
    assert len(flower.live()) == 1


def test_a_lost_database_is_filled_again_and_revoked_nodes_stay_out(lab, flower):
    revoke(lab, "n2")
    flower.keys.clear()
    done = run("register", lab.folder)
    assert "registered n1" in done.output
    assert "revoked: n2" in done.output
    assert flower.live() == {key_body(lab.nodes["n1"].public_key)}
    done = run("register", lab.folder)
    assert "every other node is registered" in done.output
    done = run("add-node", lab.folder, "n2")
    assert isinstance(done.exception, ConfigError)
    assert "rotate-key" in str(done.exception)


def test_a_key_that_is_not_of_the_deployment_is_shown(lab, flower):
    flower.keys["somebody's key"] = Listed("4711", True)
    done = run("register", lab.folder)
    assert "4711, which is not of this deployment; bar it with: FLWR_HOME=" in done.output


def test_one_node_that_cannot_be_registered_does_not_hold_up_the_others(lab, flower):
    for name in ("n3", "n4"):
        lab.add_node(name)
    lab.save()
    flower.refused = key_body(lab.nodes["n3"].public_key)
    done = run("register", lab.folder)
    assert done.exit_code == 1
    assert "error: n3: refused" in done.output
    assert "registered n4" in done.output


def test_a_refusal_does_not_ask_whether_the_superlink_runs(lab, monkeypatch):
    def answer(text):
        def run(command, **_):
            return subprocess.CompletedProcess(
                command, 1, f'{{"success": false, "error-message": "{text}"}}', ""
            )

        monkeypatch.setattr(subprocess, "run", run)

    answer("[code: 24] Node ID not found for account.")
    with pytest.raises(FederationError, match=re.escape("not found for account.") + "$"):
        flwr(lab, "supernode", "unregister", "1")
    answer("Connection refused")
    with pytest.raises(FederationError, match="does the SuperLink"):
        flwr(lab, "supernode", "unregister", "1")


def test_commands_wait_for_one_another(lab, monkeypatch):
    monkeypatch.setattr("heterotune_flwr.deploy.layout.LOCK_SECONDS", 0.05)
    with Deployment.change(lab.folder):
        done = run("register", lab.folder)
    assert "another command" in str(done.exception)


def test_the_nodes_own_key_is_known_by_its_body(tmp_path):
    line = read_public(new_node_key(tmp_path, "n"))
    assert key_body(line) == key_body(line.replace(" n\n", " another comment\n"))
