"""What ``node check`` must not call ready, because the client or Flower refuses it later; files that are damaged."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from heterotune_flwr.cli import app
from heterotune_flwr.deploy import machine_checks, node_check, server_checks
from heterotune_flwr.deploy.folder import initialise
from heterotune_flwr.deploy.keys import public_of
from heterotune_flwr.deploy.node_config import read_node_settings, supernode_command
from heterotune_flwr.errors import ConfigError


@pytest.fixture
def node(tmp_path):
    deployment = initialise(tmp_path / "lab", ["127.0.0.1:1"], ["clinic"], {}, 90, False)
    return deployment.node("clinic")


def edit(place, old, new):
    text = (place / "node.toml").read_text()
    assert old in text
    (place / "node.toml").write_text(text.replace(old, new))


def found(part, place):
    """The findings of one part of the check, by name."""
    return {f.name: f for f in node_check.guarded(part, read_node_settings(place))}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[client]", '[client]\nslots = "nonsense"', "choose all, upper-half or last-"),
        ("[client]", '[client]\nworker = "perhaps"', "choose from on, off"),
        ("[client]", "[client]\nthreads = 100000000000000000000", "at most 1024"),
        ("# port = 9094", "port = 0 #", "there is no port 0"),
        ("# port = 9094", "port = -1 #", "there is no port -1"),
        ("# port = 9094", "port = 99999 #", "there is no port 99999"),
        ('"127.0.0.1:1"', '"https://lab.example.org:8443"', "write it as host:port"),
        ('"127.0.0.1:1"', '"10.77.0.1:²"', "write it as host:port"),
        ('"127.0.0.1:1"', '"10.77.0.1:99999"', "no port 99999"),
        ('# device = "cuda:0"', 'device = "cuda:²"', "write cpu, cuda or cuda:0"),
        ('"clinic"', '"../../etc/x"', "client-id is"),
        ('"clinic"', '"клиника"', "client-id is"),
        ('"clinic"', f'"{"n" * 5000}"', "at most 64"),
        ('"clinic"', '"a\\u0007b"', "client-id is"),
    ],
)
def test_values_that_are_refused_later_are_refused_at_once(node, old, new, words):
    edit(node, old, new)
    with pytest.raises(ConfigError, match=words):
        read_node_settings(node)
    (finding,) = node_check.check_node(node, offline=True)
    assert finding.state == "fail"


def test_usual_values_pass(node):
    edit(node, "[client]", '[client]\nslots = "last-2"\nworker = "off"\nthreads = 8')
    edit(node, '"127.0.0.1:1"', '"[2001:db8::1]:8443"')
    settings = read_node_settings(node)
    assert (settings.host, settings.server_port) == ("2001:db8::1", 8443)


def test_anchors_and_cache_must_be_there(node):
    edit(node, "[client]", '[client]\nanchors = "mine.txt"\ncache = "cache"')
    assert found(machine_checks.anchors, node)["anchors"].state == "fail"
    (node / "cache").touch()
    finding = found(machine_checks.cache, node)["cache"]
    assert (finding.state, "is a file where a folder should be" in finding.message) == (
        "fail",
        True,
    )
    (node / "cache").unlink()
    (node / "mine.txt").write_text("".join(f"anchor {i}\n" for i in range(12)))
    assert found(machine_checks.anchors, node)["anchors"].message == "12 anchors"
    assert found(machine_checks.cache, node)["cache"].state == "ok"
    edit(node, "mine.txt", "wordnet")
    assert found(machine_checks.anchors, node)["anchors"].state == "ok"


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_the_ca_is_looked_at_offline_too_and_before_the_start(node, content):
    (node / "ca.crt").unlink()
    if content:
        (node / "ca.crt").write_text(content)
    assert "ca.crt" in found(server_checks.ca, node)["ca"].message
    with pytest.raises(ConfigError, match=r"copy the server's ca\.crt"):
        supernode_command(read_node_settings(node))


def test_settings_in_other_encodings(node):
    text = (node / "node.toml").read_text()
    (node / "node.toml").write_bytes(text.encode("utf-8-sig"))
    assert read_node_settings(node).client["client-id"] == "clinic"
    for encoding in ("utf-16", "latin-1"):
        (node / "node.toml").write_bytes((text + "# é\n").encode(encoding))
        with pytest.raises(ConfigError, match="save it as UTF-8"):
            read_node_settings(node)


@pytest.mark.parametrize("content", ["{", '{"versions": [1]}', "[]"])
def test_a_damaged_manifest_is_not_a_missing_one(node, content):
    (node / "manifest.json").write_text(content)
    finding = found(server_checks.libraries, node)["libraries"]
    assert (finding.state, "is damaged" in finding.message) == ("fail", True)
    (node / "manifest.json").unlink()
    finding = found(server_checks.libraries, node)["libraries"]
    assert (finding.state, "no manifest.json" in finding.mend) == ("warn", True)


def test_a_server_without_torch_is_no_measure_for_nodes(node, monkeypatch):
    manifest = json.loads((node / "manifest.json").read_text())
    manifest["versions"]["torch"] = "missing"
    (node / "manifest.json").write_text(json.dumps(manifest))
    assert found(server_checks.libraries, node)["libraries"].state == "ok"
    here = dict(manifest["versions"])
    monkeypatch.setattr(server_checks, "installed_versions", lambda: here)
    finding = found(server_checks.libraries, node)["libraries"]
    assert (finding.state, finding.mend.endswith("pip install torch")) == ("fail", True)


def test_the_command_for_a_missing_key_works(node, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (node / "node.key").unlink()
    (node / "node.pub").unlink()
    message = found(machine_checks.key, node)["key"].message
    command = message.split("make one with: heterotune ")[1].split(",")[0]
    assert "clinic.pub" in message
    before = {*tmp_path.rglob("*")}
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code == 0, done.output
    made = {path.relative_to(node).as_posix() for path in {*tmp_path.rglob("*")} - before}
    assert made == {"node.key", "node.pub", "clinic.pub"}
    assert found(machine_checks.key, node)["key"].state == "ok"


def test_a_node_key_has_a_name_that_can_be_one(tmp_path):
    folder = tmp_path / "node"
    for name in ("a b/../c", "", "../n"):
        done = CliRunner().invoke(app, ["node", "key", name, "--dir", str(folder)])
        assert isinstance(done.exception, ConfigError)
        assert "no name for a node" in str(done.exception)
    assert not folder.exists()


def test_a_node_key_whose_making_was_cut_short_is_finished_and_others_are_kept(tmp_path):
    call = ["node", "key", "n1", "--dir", str(tmp_path)]
    assert CliRunner().invoke(app, call).exit_code == 0
    line = public_of(tmp_path / "node.key", "n1")
    for path in ("node.pub", "n1.pub"):
        (tmp_path / path).unlink()
    assert CliRunner().invoke(app, call).exit_code == 0
    assert (tmp_path / "n1.pub").read_text() == line
    assert "never overwritten" in str(CliRunner().invoke(app, call).exception)


def test_a_state_dir_that_is_a_file_is_not_to_be_given_another_owner(node):
    (node / "state").touch()
    finding = found(machine_checks.state_dir, node)["state dir"]
    assert "chown" not in finding.message + finding.mend
    assert "move it away" in finding.message
