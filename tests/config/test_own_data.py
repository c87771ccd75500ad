"""What is said of data of one's own before a run starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from chat_templates import MARKS, TEMPLATES
from tiny_backbones import LABELS, save_tokenizer, write_rows

from heterotune_flwr.config.compose import INLINE, compose, to_yaml
from heterotune_flwr.data.sources import global_test, training_pool
from heterotune_flwr.own_data import own_data

OPEN = ["data.max_labels=0", "alignment.output=vocabulary", "data.generate=20"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def said(path: Path, tokenizer, *overrides: str) -> str:
    config = compose("quick", [f"data.train={path}", *overrides])
    return "\n".join(own_data(config, {"mine": tokenizer}))


def rows_of(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_clients_and_what_is_about_something_else(tmp_path, tokenizer):
    path = write_rows(tmp_path / "train.jsonl", 250)
    text = said(path, tokenizer)
    assert "train.jsonl: 200 of 250 rows go to 6 clients (86 to train, 48 for" in text
    assert "their personal tests, 66 to choose what they keep)" in text
    assert "50 rows kept of them for the test" in text
    assert all(
        f"; {number} tiny-{'abc'[number % 3]}@{('bf16', 'int8', 'nf4')[number % 3]}: 3" in text
        for number in range(1, 6)
    )
    assert all(f"{label} " in text for label in LABELS)
    assert "no text is cut" in text
    assert "aligned on descriptions of Debian packages (debian-other)" in text
    assert "chat template" not in text
    own = said(
        path, tokenizer, "data.examples_per_client=10", "data.prompt=Q: {text} A:", "data.partition=natural",
        "data.personal_test_examples=2", f"data.test={path}", f"alignment.anchors={path}",
        "data.global_test_examples=40", "types=[{backbone: tiny-a, bits: bf16, clients: 7}]",
    )  # fmt: skip
    assert "112 of 250 rows go to 7 clients (70 to train, 14 for" in own
    assert "40 rows of the test file" in own
    assert "warning" not in own
    assert own_data(compose("quick"), {"mine": tokenizer}) == []


def test_which_backbones_are_asked_in_their_chat_template(tmp_path, tokenizer):
    path = write_rows(tmp_path / "train.jsonl", 60)
    chat = save_tokenizer(tmp_path, TEMPLATES["chatml"], MARKS["chatml"])
    config = compose("quick", [f"data.train={path}", "data.max_length=256"])
    both = "\n".join(own_data(config, {"talker": chat, "mine": tokenizer}))
    assert "talker: asked in the model's own chat template (data.template); mine: as plain" in both
    plain = replace(config, data=replace(config.data, template="plain"))
    assert "chat template" not in "\n".join(own_data(plain, {"talker": chat}))


def test_what_is_about_the_shipped_data_does_not_hold_for_ones_own(tmp_path):
    path = write_rows(tmp_path / "train.jsonl", 60)
    shipped, own = compose("demo").data, compose("demo", f"data.train={path}").data
    assert (shipped.template, shipped.prompt) == ("plain", "Package: {text}\nSection:")
    assert (own.template, own.prompt) == ("auto", "{text}\nAnswer:")
    kept = compose("demo", [f"data.train={path}", "data.template=plain", "data.prompt=Q: {text}"])
    assert (kept.data.template, kept.data.prompt) == ("plain", "Q: {text}")


def test_many_clients_are_told_in_one_line(tmp_path, tokenizer):
    path = write_rows(tmp_path / "train.jsonl", 600)
    text = said(path, tokenizer, "types=[{backbone: tiny-a, bits: bf16, clients: 48}]")
    assert "; 36 more of 10 to 10" in text


def test_labels_of_several_lines_are_told_in_one(tmp_path, tokenizer):
    path = write_rows(tmp_path / "train.jsonl", 60)
    path.write_text(path.read_text().replace('"motor"', json.dumps("motor\n\n" + "very " * 99)))
    lines = own_data(compose("quick", [f"data.train={path}"]), {"mine": tokenizer})
    assert not any("\n" in line for line in lines)
    assert any("motor very very" in line and len(line) < 1500 for line in lines)


def test_what_is_cut_is_counted_with_what_is_left(tmp_path, tokenizer):
    rows = [{"text": "red apples " * (60 if n % 4 == 0 else 1), "label": LABELS[n % 3]} for n in range(40)]  # fmt: skip
    path = rows_of(tmp_path / "long.jsonl", [{**r, "text": f"{r['text']}{n}"} for n, r in enumerate(rows)])  # fmt: skip
    text = said(path, tokenizer, "data.max_length=64")
    assert (
        "25 % of the prompts are cut to fit data.max_length=64 tokens (mine), one to its " in text
    )
    assert "99 of 100 would fit whole with data.max_length=" in text
    wide = text.split("fit whole with data.max_length=")[1].split("\n")[0]
    assert "no text is cut" in said(path, tokenizer, f"data.max_length={wide}")


def test_labels_that_share_tokens_take_room_from_their_prompts(tmp_path, tokenizer):
    """A prompt that just fits is cut by what is read of the labels behind it."""
    rows = [{"text": f"red apples {n}", "label": LABELS[n % 3]} for n in range(30, 60)]
    path = rows_of(tmp_path / "apart.jsonl", rows)
    longest = int(said(path, tokenizer).split("the longest has ")[1].split(" of")[0])
    assert "no text is cut" in said(path, tokenizer, f"data.max_length={longest}")
    alike = [{**row, "label": f"quiet {row['label']}"} for row in rows]
    text = said(rows_of(path, alike), tokenizer, f"data.max_length={longest}")
    assert f"100 % of the prompts are cut to fit data.max_length={longest} tokens" in text
    assert "every text is read" not in text  # all labels begin with the same word
    rows[0]["label"], rows[1]["label"] = "quiet music box", "Fruit"
    text = said(rows_of(path, rows), tokenizer)
    assert "warning: labels 'Fruit' and 'fruit' differ in case alone (1 such)" in text
    names = ["quiet fruit", "quiet motor", "song of fruit", "song of motor"]
    mixed = [{**row, "label": names[number % 4]} for number, row in enumerate(rows)]
    text = said(rows_of(path, mixed), tokenizer)
    assert "labels share their first tokens: every text is read 2 times (mine)" in text


def test_answers_that_are_too_long_or_never_match(tmp_path, tokenizer):
    rows = [{"text": f"a song {n}", "label": f"{LABELS[n % 3]} {n}"} for n in range(40)]
    rows[11]["label"] = "music " * 150
    rows[20]["label"] = "1. fruit\n2. motor"
    path = rows_of(tmp_path / "rows.jsonl", rows)
    text = said(path, tokenizer, *OPEN)
    assert "1 of 40 answers leave no room for a prompt and are cut, the first in row 12: 15" in text
    assert "1 of 40 right answers hold data.stop ('\\n')" in text
    assert "1 of 40 right answers have more than data.max_answer_tokens=32 tokens" in text
    assert "never match" not in said(path, tokenizer, *OPEN, "data.generate=0")
    assert "data.stop" not in said(path, tokenizer, *OPEN, "data.stop=null")
    # Another right answer that can match is enough.
    rows[20]["references"] = ["fruit"]  # type: ignore[assignment]
    assert "data.stop" not in said(rows_of(path, rows), tokenizer, *OPEN)


def test_a_presets_columns_and_sizes_are_about_its_own_data(tmp_path):
    path = write_rows(tmp_path / "train.jsonl", 250)
    assert compose("quick").data.examples_per_client == 32
    assert compose("open_text").data.client_field == "label"
    data = compose("open_text", [f"data.train={path}"]).data
    assert (data.examples_per_client, data.client_field, data.max_answer_tokens) == (None, "client", 32)  # fmt: skip
    config = compose("quick", [f"data.train={path}", "data.examples_per_client=9"])
    assert config.data.examples_per_client == 9
    assert compose(INLINE + to_yaml(config)).data == config.data
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        f"groups: {{data: debian_sections}}\ndata: {{train: {path}, personal_test_examples: 5}}\n"
    )
    data = compose(str(mine)).data
    assert (data.examples_per_client, data.personal_test_examples) == (None, 5)
    assert len(training_pool(data)) + len(global_test(data)) == 250
