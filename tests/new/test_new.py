"""``heterotune new``: what it proposes for a file, what it asks for, what it refuses."""

from __future__ import annotations

import csv
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from heterotune_flwr import cli_new
from heterotune_flwr.cli import app
from heterotune_flwr.config.compose import compose
from heterotune_flwr.errors import HeteroTuneError
from heterotune_flwr.experiment import with_absolute_paths
from heterotune_flwr.new.table import look
from heterotune_flwr.preflight import preflight
from heterotune_flwr.schema import Config

SHOPS, FEELINGS = ("north", "south", "east", "west"), ("good", "bad")


def reviews(path: Path, rows: int = 96) -> Path:
    """A table whose columns are not called as usual."""
    with path.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["no", "shop", "review text", "mood"])
        for i in range(rows):
            mood = FEELINGS[i % 3 == 0]
            text = f"the soup number {i} tasted {mood} again"
            table.writerow([i, SHOPS[i * 7 % 4], text, mood])
    return path


def talks(path: Path, rows: int = 60) -> Path:
    """Conversations with answers of several lines."""
    lines = (
        {
            "messages": [
                {"role": "user", "content": f"what is {i} and one?"},
                {"role": "assistant", "content": f"let me see:\nit is {i + 1}"},
            ]
        }
        for i in range(rows)
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def new(*words: Any, typed: str | None = None) -> str:
    """The command, and what it prints; HeteroTuneError as the command line shows it."""
    done = CliRunner().invoke(app, ["new", *map(str, words)], input=typed)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def written(folder: Path) -> Config:
    return with_absolute_paths(compose(str(folder / "run.yaml")))


def test_labels_with_natural_clients_run_from_anywhere(tmp_path, monkeypatch):
    file = reviews(tmp_path / "reviews.csv")
    columns = ("--text", "review text", "--label", "mood", "--client-column", "shop")
    said = new(tmp_path / "soups", "--data", file, *columns)
    assert "96 rows" in said
    monkeypatch.chdir("/")
    config = written(tmp_path / "soups")
    assert Path(str(config.data.train)).resolve() == file.resolve()
    assert (config.data.text_field, config.data.label_field) == ("review text", "mood")
    assert (config.data.partition, config.data.client_field) == ("natural", "shop")
    assert sum(entry.clients for entry in config.types) == len(SHOPS)
    assert config.data.prompt == "Review text: {text}\nMood:"
    assert config.run.name == "soups"
    notes = preflight(config)
    (warning,) = [note for note in notes if note.startswith("warning")]
    assert "not on texts like yours" in warning  # nobody but its user knows some
    text = (tmp_path / "soups" / "run.yaml").read_text()
    settings = [line for line in text.splitlines() if ":" in line and "{" not in line]
    assert sum("  # " in line for line in settings) > len(settings) / 2


def test_own_anchors_leave_nothing_to_warn_of(tmp_path):
    file = reviews(tmp_path / "reviews.csv")
    (tmp_path / "menus.txt").write_text(
        "".join(f"the soup or bread number {i} tasted good or bad again\n" for i in range(120))
    )
    said = new(
        tmp_path / "soups", "--data", file, "--text", "review text", "--label", "mood",
        "--anchors", tmp_path / "menus.txt", "--backbone", "tiny-a@nf4", "--backbone", "tiny-b",
        "--clients", 3,
    )  # fmt: skip
    assert "warning" not in said
    config = written(tmp_path / "soups")
    found = [(entry.backbone, entry.bits, entry.clients) for entry in config.types]
    assert found == [("tiny-a", "nf4", 2), ("tiny-b", "bf16", 1)]
    assert config.data.partition == "dirichlet"
    assert config.alignment.anchors == str(tmp_path / "menus.txt")
    assert config.method.latent <= 30  # of 120 texts


def test_conversations_are_open_text_whose_answers_fit(tmp_path):
    said = new(tmp_path / "talk", "--data", talks(tmp_path / "talks.jsonl"))
    assert "read as conversations" in said
    config = written(tmp_path / "talk")
    assert (config.data.max_labels, config.data.stop) == (0, None)
    assert config.alignment.output == "vocabulary"
    assert not [
        note for note in preflight(config) if "can never match" in note or "are cut" in note
    ]


def test_a_files_columns_cannot_steer_the_terminal(tmp_path):
    file = reviews(tmp_path / "reviews.csv")
    file.write_text(file.read_text().replace("shop", "shop\x1b[2J"))
    said = new(tmp_path / "soups", "--data", file, "--text", "review text", "--label", "mood")
    assert "shop?[2J" in said


def test_few_rows_have_few_clients(tmp_path):
    file = reviews(tmp_path / "reviews.csv", rows=30)
    new(tmp_path / "soups", "--data", file, "--text", "review text", "--label", "mood")
    assert [entry.clients for entry in written(tmp_path / "soups").types] == [1, 1, 1]


def test_a_backbone_that_is_not_here_is_fetched_first(tmp_path, monkeypatch):
    monkeypatch.setenv("HETEROTUNE_CACHE", str(tmp_path / "cache"))
    file = reviews(tmp_path / "reviews.csv")
    columns = ("--text", "review text", "--label", "mood")
    new(
        tmp_path / "soups",
        "--data",
        file,
        *columns,
        "--backbone",
        "smollm2@nf4",
        "--backbone",
        "tiny-a",
    )
    assert "heterotune fetch smollm2" in (tmp_path / "soups" / "README.md").read_text()


def test_the_page_names_commands_that_there_are(tmp_path):
    new(tmp_path / "talk", "--data", talks(tmp_path / "talks.jsonl"))
    root: Any = typer.main.get_command(app)
    page = (tmp_path / "talk" / "README.md").read_text()
    commands = [line.partition("#")[0] for line in page.splitlines() if line.startswith("    ")]
    assert commands
    for line in commands:
        program, *words = shlex.split(line)
        assert program == "heterotune"
        command = root
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        options = {name for parameter in command.params for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options


def test_on_a_terminal_it_asks_for_what_is_not_said(tmp_path, monkeypatch):
    monkeypatch.setattr(cli_new, "_asks", lambda: True)
    file = reviews(tmp_path / "reviews.csv")
    said = new(tmp_path / "soups", typed=f"{file}\n\n\n\ntiny-a@nf4 tiny-c@nf4\n-\n")
    for question in ("[review text]", "[mood]", "[shop]", "Model types"):
        assert question in said
    config = written(tmp_path / "soups")
    assert (config.data.text_field, config.data.label_field) == ("review text", "mood")
    assert config.data.client_field == "shop"
    assert [entry.backbone for entry in config.types] == ["tiny-a", "tiny-c"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--data is missing"),
        (["--data", "nowhere.csv"], "does not exist"),
        (
            ["--data", "reviews.csv"],
            "--text is missing: column with the text; 'review text' may be it",
        ),
        (["--data", "reviews.csv", "--text", "review text"], "--label is missing"),
        (
            ["--data", "reviews.csv", "--text", "reviews text", "--label", "mood"],
            "did you mean 'review text'",
        ),
        (["--client-column", "shp"], "--client-column: .* did you mean 'shop'"),
        (["--client-column", "no"], "two clients at least"),
        (["--clients", "2"], "3 backbones need a client each"),
        (["--clients", "400"], "96 rows are enough for 12 clients"),
        (["--backbone", "tiny-z@nf4"], "did you mean 'tiny-"),
        (["--backbone", "tiny-a@nf5"], "NAME@BITS"),
        (["--anchors", "nowhere.txt"], "neither a shipped set"),
        (["--test", "nowhere.csv"], "does not exist"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    reviews(tmp_path / "reviews.csv")
    if words and words[0] != "--data":
        words = ["--data", "reviews.csv", "--text", "review text", "--label", "mood", *words]
    with pytest.raises(HeteroTuneError, match=told) as caught:
        new("soups", *words)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "soups").exists()


def test_nothing_is_overwritten(tmp_path):
    file = talks(tmp_path / "talks.jsonl")
    for name in ("run.yaml", "README.md"):
        place = tmp_path / name.replace(".", "-")
        place.mkdir()
        (place / name).write_text("mine")
        with pytest.raises(HeteroTuneError, match="is there already"):
            new(place, "--data", file)
        assert [path.read_text() for path in place.iterdir()] == ["mine"]
    with pytest.raises(HeteroTuneError, match="is a file"):
        new(file, "--data", file)


def test_columns_are_proposed_by_name_and_by_what_is_in_them(tmp_path):
    table = look(reviews(tmp_path / "reviews.csv"))
    assert (table.rows, table.text(), table.label(["review text"])) == (96, "review text", "mood")
    assert table.client(["review text", "mood"]) == "shop"
    (tmp_path / "b.csv").write_text(
        "a,b\n" + "".join(f"some words {i},x{i % 3}\n" for i in range(40))
    )
    table = look(tmp_path / "b.csv")
    assert (table.text(), table.label(["a"]), table.client(["a", "b"])) == ("a", "b", None)


def test_usual_columns_are_known_whatever_their_case(tmp_path):
    file = tmp_path / "a.csv"
    lines = (f"the soup number {i} was fine,{FEELINGS[i % 2]},{SHOPS[i % 4]}\n" for i in range(96))
    file.write_text("Text, Label,CLIENT\n" + "".join(lines))
    new(tmp_path / "soups", "--data", file)  # nobody to ask
    data = written(tmp_path / "soups").data
    assert (data.partition, data.client_field) == ("natural", "CLIENT")


def test_closed_standard_input_is_nobody_to_ask(heterotune, tmp_path):
    done = heterotune("new", tmp_path / "run", said=None)
    assert done.returncode == 1
    assert "error: --data is missing" in done.stderr
