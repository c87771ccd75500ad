"""``heterotune status`` of a run that was handed to the SuperLink and has written nothing yet."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from heterotune_flwr.cli import app
from heterotune_flwr.deploy import submitted as module
from heterotune_flwr.deploy.folder import initialise
from heterotune_flwr.deploy.submitted import Submitted, not_begun, remember
from heterotune_flwr.errors import FederationError


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab") / "lab"
    return initialise(folder, ["10.0.0.1"], ["n1"], {}, 365.0, False)


@pytest.fixture
def handed(lab, monkeypatch):
    """A run's directory, and a way to say what Flower says of it."""
    directory = lab.folder / "runs" / "mine"
    remember(lab.operator, Submitted("7", directory))

    def says(word):
        def flwr(deployment, *arguments, named):
            if word is None:
                raise FederationError("the SuperLink does not answer")
            return {"runs": [{"status": word}]}

        monkeypatch.setattr(module, "flwr", flwr)
        done = CliRunner().invoke(app, ["status", str(directory), "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.output)

    return directory, says


def test_it_is_starting_and_names_its_log(lab, handed):
    told = handed[1]("pending")
    assert told["state"] == "starting"
    assert "Flower says pending" in told["phase"]
    assert f"FLWR_HOME={lab.operator} flwr log 7 lab" in told["phase"]
    assert "does not answer" in handed[1](None)["phase"]


def test_one_that_ended_before_it_wrote_anything_has_failed(handed):
    told = handed[1]("finished:failed")
    assert told["state"] == "failed"
    assert "flwr log 7 lab" in told["reason"]


def test_one_that_has_begun_is_read_from_its_journal(handed):
    directory, _ = handed
    directory.mkdir(parents=True)
    (directory / "rounds.jsonl").write_text("")
    assert not_begun(directory) is None
    assert not_begun(directory.parent / "never") is None
    assert not_begun(directory.parent.parent) is None
