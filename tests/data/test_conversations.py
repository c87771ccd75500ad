"""Conversations and instructions are recognised, or refused with their row."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from own_files import SECRET, lines, parquet, read

from heterotune_flwr.data import Example, sources
from heterotune_flwr.data.examples import Turn
from heterotune_flwr.data.sources import columns_recognised, how_read, read_examples
from heterotune_flwr.errors import DataError
from heterotune_flwr.schema import DataConfig

TURNS = [("user", "hello"), ("assistant", "good day"), ("user", "and?"), ("assistant", "done")]


OPENAI = [{"role": role, "content": text} for role, text in TURNS]


SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}[r], "value": t} for r, t in TURNS]


SAID = Example(
    "user: hello\nassistant: good day\nuser: and?",
    "done",
    turns=(Turn("user", "hello"), Turn("assistant", "good day"), Turn("user", "and?")),
)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": OPENAI}, {"conversations": SHAREGPT}, {"conversation": OPENAI}, {"text": OPENAI},
        {"messages": json.dumps(OPENAI)}, {"messages": json.dumps(SHAREGPT, indent=1)},
        {"messages": OPENAI, "text": "what is this", "id": 3}, {"text": json.dumps(OPENAI)},
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
def test_conversations_are_recognised(row: dict[str, object], form: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{form}"
    if form == "parquet":
        parquet(path, {name: [value, value] for name, value in row.items()})
    elif form == "json":
        path.write_text(json.dumps([row, row], indent=2))
    else:
        lines(path, [row, row])
    assert read(path) == [SAID, SAID]
    assert (how_read(path, DataConfig()) is not None) == (next(iter(row)) != "text")


def test_a_run_says_which_of_its_files_tell_their_own_columns(tmp_path: Path) -> None:
    chat = lines(tmp_path / "chat.jsonl", [{"messages": OPENAI}])
    plain = lines(tmp_path / "plain.jsonl", [{"text": "t", "label": "l"}])
    (line,) = columns_recognised(DataConfig(train=str(chat), test=str(plain)))
    assert line.startswith(f"{chat} is read as conversations")
    assert columns_recognised(DataConfig()) == []


def test_a_chat_in_a_csv_file_and_in_a_column_that_was_named(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["messages"], [json.dumps(OPENAI)]])
    assert read(tmp_path / "a.csv") == [SAID]
    for value in (OPENAI, SHAREGPT, json.dumps(SHAREGPT)):
        path = lines(tmp_path / "b.jsonl", [{"talk": value}])
        assert read(path, text_field="talk") == [SAID]


def test_a_conversation_with_an_answer_beside_it_is_not_guessed_at(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"messages": OPENAI, "label": "spam"}])
    with pytest.raises(DataError, match="no column 'text'"):
        read(path)
    with pytest.raises(DataError, match=r"a\.jsonl:1: 'messages' .*'label'"):
        read(path, text_field="messages")
    assert read(path, text_field="messages", label_field="reply") == [SAID]
    path = lines(tmp_path / "b.jsonl", [{"messages": OPENAI, "label": None}])
    assert read(path, text_field="messages") == [SAID]


def test_instructions_are_recognised_and_settings_win(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Name it.", "input": "a red one", "output": "fruit"},
        {
            "instruction": "Say hi.",
            "input": "",
            "output": "hi",
            "text": "the whole prompt, with hi",
        },
        {"instruction": "Say ho.", "output": "ho"},
    ]
    path = tmp_path / "a.json"
    path.write_text("\ufeff" + json.dumps(rows))
    assert read(path) == [
        Example("Name it.\n\na red one", "fruit"), Example("Say hi.", "hi"), Example("Say ho.", "ho"),
    ]  # fmt: skip
    named = DataConfig(text_field="instruction", label_field="output")
    assert [e.text for e in read_examples(path, named)] == ["Name it.", "Say hi.", "Say ho."]
    assert how_read(path, named) is None
    lines(tmp_path / "b.jsonl", [{"text": "t", "label": "l", "instruction": "i", "output": "o"}])
    assert read(tmp_path / "b.jsonl") == [Example("t", "l")]
    with pytest.raises(DataError, match="no column 'question'"):
        read(path, text_field="question")
    for bad, words in (({"output": None}, "empty 'output'"), ({"output": {}}, "'output' holds an object"),
                       ({"instruction": [1, 2]}, "'instruction' holds 2 values")):  # fmt: skip
        lines(tmp_path / "c.jsonl", [rows[0], {**rows[0], **bad}])
        with pytest.raises(DataError, match=rf"c\.jsonl:2.*{words}"):
            read(tmp_path / "c.jsonl")


@pytest.mark.parametrize(
    "value",
    [None, 3, "hello", SECRET, [], [SECRET], [{"role": "user"}], OPENAI[:1], OPENAI[1:2], "[" * 100_000,
     [{"from": "human", "content": SECRET}, {"from": "gpt", "value": SECRET}],
     [{"role": "user", "content": [{"type": "image"}]}, OPENAI[1]]],
)  # fmt: skip
def test_a_conversation_that_is_none_is_refused_with_its_row(value: object, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"messages": OPENAI}, {"messages": value}])
    with pytest.raises(DataError, match=r"a\.jsonl:2: .*'messages'") as caught:
        read(path)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "holds no example"),
        ("", "holds no example"),
        ('[{"text": "a", "label": "b"},\n{"text": }]', r"a\.json:2 is not valid JSON"),
        ('[{"text": "a", "label": "b"}, 3]', r"a\.json, row 2 is not a JSON object"),
        ('{"data": [\n{"text": "a", "label": "b"}]}', r"a\.json:1 is not valid JSON"),
        ('{"text": "a", "label": "b"}\n["c"]\n', r"a\.json:2 is not a JSON object"),
    ],
)
def test_a_json_file_that_is_no_table_is_refused(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=words):
        read(tmp_path / "a.json")


def test_the_cache_of_a_file_knows_its_columns(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"text": "t", "label": "l", "other": "o"}])
    data = DataConfig(name="own", train=str(path))
    assert sources.own_file(data)[0].label == "l"
    assert sources.own_file(replace(data, label_field="other"))[0].label == "o"
