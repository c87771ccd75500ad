"""``heterotune deploy run`` refuses what cannot work before anything is sent, and says what goes on without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from heterotune_flwr import cli
from heterotune_flwr.deploy import submit as module
from heterotune_flwr.deploy.submit import settle, submit
from heterotune_flwr.errors import ConfigError, LeftRunningError
from heterotune_flwr.reporting.status import read_status


class Lab:
    """As much of a deployment as a submission looks at."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.server, self.operator = folder, folder / "server", folder / "operator"
        (folder / "runs").mkdir(parents=True)


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path / "lab")


def test_a_place_where_no_folder_can_be_made_is_refused(lab):
    with pytest.raises(ConfigError, match=r"run\.dir is /proc/x"):
        settle(lab, "demo", ["run.dir=/proc/x"])


def test_a_place_that_the_units_keep_closed_is_told(lab, tmp_path, capsys):
    settle(lab, "demo", [f"run.dir={tmp_path / 'mine'}"])
    assert "cannot write there (ReadWritePaths)" in capsys.readouterr().err
    settle(lab, "demo", [f"run.dir={lab.folder / 'runs' / 'mine'}"])
    settle(lab, "demo", [])
    assert not capsys.readouterr().err


def test_a_run_about_other_labels_says_what_measures_it(lab, capsys):
    settle(lab, "demo", ["data.labels=[fruit,motor]"])
    assert "measured on their own tests alone" in capsys.readouterr().err
    assert not list((lab.folder / "runs").iterdir())


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.labels=[a]", "at least two answers"),
        ("data.labels=[a,b,a]", "each once"),
        ("server.min_clients=0", r"server\.min_clients is 0"),
    ],
)
def test_settings_that_would_fail_on_the_nodes_are_refused(lab, override, words):
    with pytest.raises(ConfigError, match=words):
        settle(lab, "demo", [override])


def test_simulated_clients_of_a_file_are_not_waited_for(lab, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "groups: {types: tiny, data: debian_sections, method: dema, alignment: labels, train: small_data, "
        "server: simulation}\n"
        "strategies: [heterotune]\n"
        "run: {name: mine, compare: [heterotune]}\n"
    )
    config, _ = settle(lab, str(mine), [])
    assert sum(item.clients for item in config.types) == 12
    assert config.server.min_clients == 2
    assert settle(lab, str(mine), ["server.min_clients=5"])[0].server.min_clients == 5


def test_an_empty_file_is_no_run(lab, tmp_path):
    for text in ("", "# nothing yet\n"):
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"mine\.yaml is empty"):
            settle(lab, str(tmp_path / "mine.yaml"), [])


def test_an_interrupted_submission_says_that_the_run_may_go_on(lab, monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "flwr", interrupted)
    with pytest.raises(LeftRunningError, match=r"the run goes on; .*FLWR_HOME=.* list"):
        submit(lab, "demo", [], None)

    def command(**_):
        raise LeftRunningError("it goes on")

    monkeypatch.setattr(cli, "app", command)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 130
    assert capsys.readouterr().err == "it goes on\n"


@pytest.mark.parametrize("command", ["run", "deploy"])
def test_ctrl_c_before_anything_was_started_says_no_more(monkeypatch, capsys, command):
    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    monkeypatch.setattr("sys.argv", ["heterotune", command, "run"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_submitted_run_names_its_log(lab, monkeypatch, capsys):
    monkeypatch.setattr(module, "flwr", lambda *arguments, **options: {"run-id": 7})
    assert submit(lab, "demo", [], None).run_id == "7"
    assert f"FLWR_HOME={lab.operator} flwr log 7 lab" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="flwr log"):
        read_status(lab.folder / "runs" / "nothing")
