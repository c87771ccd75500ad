"""Files of another owner, the commonest mistake: each command says whose they are and what to run."""

from __future__ import annotations

import json
import os

import pytest
from closed_files import without_override

from heterotune_flwr.deploy import node_check
from heterotune_flwr.deploy.folder import initialise, write_folder
from heterotune_flwr.deploy.layout import Deployment
from heterotune_flwr.deploy.node_config import read_node_settings, supernode_command
from heterotune_flwr.deploy.owners import user_name
from heterotune_flwr.errors import ConfigError

#: A user that is not this one; giving files away takes root.
OTHER = 12345


@pytest.fixture
def node(tmp_path):
    deployment = initialise(tmp_path / "lab", ["127.0.0.1:1"], ["clinic"], {}, 90, False)
    place = deployment.node("clinic")
    rows = [{"text": f"text {i}", "label": "abc"[i % 3]} for i in range(12)]
    (place / "data").mkdir()
    (place / "data" / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("keys", "trust"):
        (place / name).mkdir()
    (place / "node.key").rename(place / "keys" / "node.key")
    (place / "ca.crt").rename(place / "trust" / "ca.crt")
    text = (place / "node.toml").read_text()
    for old, new in (
        ('"data.jsonl"', '"data/data.jsonl"'),
        ('"node.key"', '"keys/node.key"'),
        ('"ca.crt"', '"trust/ca.crt"'),
    ):
        assert old in text
        text = text.replace(old, new)
    (place / "node.toml").write_text(text)
    return place


def give_away(path):
    """Close a path to this process, and give it to another user if that can be done; what messages then say."""
    path.chmod(0o700 if path.is_dir() else 0o600)
    if os.geteuid() == 0:
        os.chown(path, OTHER, OTHER)
        return f"belongs to {OTHER}, this is run by {user_name()}"
    path.chmod(0)
    return "closed even to its owner"


def findings(place):
    return {finding.name: finding for finding in node_check.check_node(place, offline=True)}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("keys/node.key", "key"),
        ("keys", "key"),
        ("trust", "ca"),
        ("trust/ca.crt", "ca"),
        ("data", "data"),
        ("state", "state dir"),
    ],
)
def test_check_and_start_say_whose_a_file_is(node, path, name):
    if path == "state":
        (node / path).mkdir()
        (node / path / "node-config.toml").touch()
    words = give_away(node / path)
    with without_override():
        finding = findings(node)[name]
        assert finding.state == "fail"
        assert words in finding.message
        assert "run: chmod" in finding.message or "chown -R" in finding.message
        assert "make one with" not in finding.message
        if name != "data":  # starting does not read it
            with pytest.raises(ConfigError, match=words):
                supernode_command(read_node_settings(node))


@pytest.mark.parametrize("path", ["", "node.toml"])
def test_settings_that_are_closed(node, path):
    words = give_away(node / path)
    with without_override(), pytest.raises(ConfigError, match=words):
        read_node_settings(node / "node.toml")


@pytest.mark.parametrize("path", ["server", "ca", "nodes", "nodes/clinic", "deployment.json", ""])
def test_the_operators_folder(node, path):
    folder = node.parents[1]
    words = give_away(folder / path)
    with without_override(), pytest.raises(ConfigError, match=words):
        initialise(folder, [], ["b"], {}, 90, False)
    with without_override(), pytest.raises(ConfigError, match=words):
        _add_node(folder)


def _add_node(folder):
    with Deployment.change(folder) as deployment:
        deployment.add_node("b")
        write_folder(deployment)
