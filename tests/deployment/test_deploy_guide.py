"""docs/deploy.md tells of every setting of a node, and whose the folders are."""

from __future__ import annotations

from pathlib import Path

from heterotune_flwr.deploy.layout import Deployment
from heterotune_flwr.deploy.node_values import KEYS

GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "deploy.md").read_text()


def test_every_setting_of_a_node_is_in_the_guide():
    for key in {*KEYS["client"], "accept-code", "port"}:
        assert f"`{key}" in GUIDE, key


def test_the_guide_makes_the_user_of_the_units_and_gives_it_the_folders():
    user, node_folder = Deployment.user, Deployment.node_folder
    commands = [
        line.split("#")[0].split() for line in GUIDE.splitlines() if line.startswith("    ")
    ]
    made = [words[-1] for words in commands if words[:1] == ["useradd"]]
    given = [words[1:] for words in commands if words[:1] == ["chown"]]
    assert made == [user, user]  # on the server and on a node
    assert ["-R", f"{user}:", node_folder] in given
    assert ["-R", f"{user}:", "/opt/heterotune/lab"] in given
