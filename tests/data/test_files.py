"""Other people's files: values that are no text, CSV as it comes, conversations and instructions."""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from heterotune_flwr.alignment.public_texts import load_anchors
from heterotune_flwr.data import sources
from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.partition import client_examples
from heterotune_flwr.data.sources import columns_recognised, global_test, how_read, read_examples
from heterotune_flwr.errors import DataError
from heterotune_flwr.schema import AlignmentConfig, DataConfig

SECRET = "SECRET-4711"


def lines(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(path: Path, columns: dict[str, object]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)
    return path


def read(path: Path, **settings: str) -> list[Example]:
    return read_examples(path, DataConfig(**settings))


# ------------------------------------------------------------------------------------- values
@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (True, "true"), (False, "false"), (1.0, "1"), (-2.0, "-2"), (0.5, "0.5"), (1e300, "1e+300"),
        (["fruit"], "fruit"), ([3], "3"), ("nan", "nan"), ("None", "None"),
    ],
)  # fmt: skip
def test_a_value_is_the_text_that_json_would_show(value: object, text: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"text": "t", "label": value, "client": value}])
    assert read(path) == [Example("t", text, text)]


@pytest.mark.parametrize("column", ["text", "label", "client", "references"])
@pytest.mark.parametrize(
    "value", [{"text": [SECRET]}, [SECRET, {}], [[SECRET]], float("inf"), {"a": None}]
)
def test_what_is_no_text_is_refused_with_file_row_and_column(
    column: str, value: object, tmp_path: Path
) -> None:
    good = {"text": "t", "label": "l"}
    path = lines(tmp_path / "a.jsonl", [good, {**good, column: value}])
    with pytest.raises(DataError, match=rf"a\.jsonl:2.*'{column}'") as caught:
        read(path)
    assert SECRET not in str(caught.value)
    assert SECRET not in caught.value.told


@pytest.mark.parametrize("column", ["text", "label"])
@pytest.mark.parametrize("value", [None, float("nan"), "", "  ", [], [None], [""]])
def test_nothing_null_and_nan_are_refused_alike(column: str, value: object, tmp_path: Path) -> None:
    good = {"text": "t", "label": "l"}
    path = lines(tmp_path / "a.jsonl", [good, {**good, column: value}])
    with pytest.raises(DataError, match=rf"a\.jsonl:2 has an empty '{column}'"):
        read(path)


def test_a_client_may_be_missing_and_is_never_called_none_or_nan(tmp_path: Path) -> None:
    rows = [{"text": "t", "label": "l", "client": c} for c in (None, float("nan"), "", 7.0)]
    assert [e.client for e in read(lines(tmp_path / "a.jsonl", rows))] == ["", "", "", "7"]


def test_columns_of_parquet_are_read_or_refused_by_the_same_rule(tmp_path: Path) -> None:
    import pyarrow as pa

    texts = ["a", "b", "c"]
    good = {
        "whole": pa.array([0.0, 1.0, 0.0]),
        "exact": pa.array([decimal.Decimal("0.50")] * 3),
        "kinds": pa.array(["x", "y", "x"]).dictionary_encode(),
        "truth": pa.array([True, False, True]),
    }
    path = parquet(tmp_path / "a.parquet", {"text": texts, **good})
    read_as = {name: [e.label for e in read(path, label_field=name)] for name in good}
    assert read_as == {
        "whole": ["0", "1", "0"], "exact": ["0.50"] * 3, "kinds": ["x", "y", "x"],
        "truth": ["true", "false", "true"],
    }  # fmt: skip
    day = datetime.datetime(2026, 1, 2)
    for bad in (
        [b"x"] * 3,
        [day] * 3,
        [{"a": "x"}] * 3,
        [1.0, float("nan"), 2.0],
        ["x", None, "y"],
    ):
        path = parquet(tmp_path / "b.parquet", {"text": texts, "label": bad})
        with pytest.raises(DataError, match=r"b\.parquet, row [12].*'label'"):
            read(path)


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_class_numbers_of_datasets_are_their_names(form: str, tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    table = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    path = tmp_path / f"a.{form}"
    table.save_to_disk(str(path)) if form == "saved" else table.to_parquet(str(path))
    assert [e.label for e in read(path)] == ["good", "bad"]
    none = Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}, features=features)
    path = tmp_path / f"b.{form}"
    none.save_to_disk(str(path)) if form == "saved" else none.to_parquet(str(path))
    with pytest.raises(DataError, match="row 2 has an empty 'label'"):
        read(path)


@pytest.mark.parametrize(
    ("file", "damage"),
    [("state.json", "{}"), ("state.json", "[]"), ("state.json", ""), ("dataset_info.json", "[]"),
     ("data-00000-of-00001.arrow", "x")],
)  # fmt: skip
def test_a_damaged_saved_dataset_is_one_line(file: str, damage: str, tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list([{"text": "a", "label": "b"}]).save_to_disk(str(tmp_path))
    (tmp_path / file).write_text(damage)
    with pytest.raises(DataError, match="cannot be read as dataset"):
        read(tmp_path)


def test_further_answers_are_a_text_or_a_list_of_texts(tmp_path: Path) -> None:
    rows = [{"text": "t", "label": "l", "references": r} for r in (["a", 3], "b", None, [])]
    found = [e.references for e in read(lines(tmp_path / "a.jsonl", rows))]
    assert found == [("a", "3"), ("b",), (), ()]
    path = lines(tmp_path / "b.jsonl", [{"text": "t", "label": "l", "references": ["a", None]}])
    with pytest.raises(DataError, match=r"b\.jsonl:1 has an empty 'references'"):
        read(path)


def test_an_answer_outside_the_labels_is_told_with_its_row(tmp_path: Path) -> None:
    rows = [{"text": "t", "label": name} for name in ("yes", "no", "perhaps")]
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    data = DataConfig(name="own", train=str(path), test=str(path), labels=["yes", "no"])
    with pytest.raises(DataError, match=r"a\.jsonl: the answer of row 5 is not"):
        global_test(data)
    with pytest.raises(DataError, match=r"a\.jsonl: the answer of row 5 is not"):
        client_examples(data, 0, 1, seed=0)


def test_examples_of_another_package_must_be_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [
        Example(None, "l"), Example("t", float("nan")), Example("t", "l", 3),
        Example("t", "l", "c", "one"), Example("t", "l", "c", (None,)), Example(" ", "l"),
        Example("t\ud800", "l"), ("t", "l"),
    ]  # type: ignore[arg-type] # fmt: skip
    for number, bad in enumerate(cases):
        examples = [Example("t", "l"), bad]
        monkeypatch.setattr(sources, "load_plugin", lambda *_, given=examples: lambda part: given)
        with pytest.raises(DataError, match="of an installed package"):
            sources.plugin_examples(f"bad-{number}", "train")


# ------------------------------------------------------------------------------------ anchors
def test_an_anchor_is_a_text_or_refused_with_its_line(tmp_path: Path) -> None:
    good = [{"text": f"anchor {n}"} for n in range(12)]
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for bad in ({"text": None}, {"text": float("nan")}, {"text": chat}, {"text": " "}, {"t": "a"},
                {"text": "\ud800"}, ["a"]):  # fmt: skip
        path = lines(tmp_path / "a.jsonl", [*good, bad])
        with pytest.raises(DataError, match=r"a\.jsonl:13") as caught:
            load_anchors(AlignmentConfig(anchors=str(path)))
        assert caught.value.told == "its anchors cannot be used"
    path = lines(tmp_path / "a.jsonl", [*good, {"text": ["one"]}, {"text": 7}])
    assert load_anchors(AlignmentConfig(anchors=str(path)))[-3:] == ["anchor 11", "one", "7"]


def test_anchors_are_read_from_every_form(tmp_path: Path) -> None:
    texts = [f"anchor {n}" for n in range(12)]
    (tmp_path / "a.txt").write_text("\ufeff" + "\r\n\n".join(texts), newline="")
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts]))
    (tmp_path / "a.csv").write_text("\n".join(["text", *texts]))
    parquet(tmp_path / "a.parquet", {"text": texts})
    for name in ("a.txt", "a.json", "a.csv", "a.parquet"):
        assert load_anchors(AlignmentConfig(anchors=str(tmp_path / name))) == texts, name
    for name, raw in {"b.txt": "\n".join(texts).encode("utf-16"), "c.txt": b"a\nb\n\xe9\n"}.items():
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(DataError, match="UTF-16" if name == "b.txt" else r"c\.txt:3 is not"):
            load_anchors(AlignmentConfig(anchors=str(tmp_path / name)))


# ---------------------------------------------------------------------------------------- CSV
def test_no_row_of_a_csv_file_is_lost(tmp_path: Path) -> None:
    """An unclosed quote that a later one closes would swallow the rows between."""
    head = 'text,label\nviolins,music\n"the 12 inch record,music\nfast engines,motor\nred apples,fruit\n'
    closings = [
        '"5 inch drive",motor\n',
        "red pears,fruit\n",
        'a 5" drive,motor\n',
        '"a ""b""",motor\n',
    ]
    for number, closing in enumerate(closings):
        path = tmp_path / f"{number}.csv"
        path.write_text(head + closing)
        with pytest.raises(DataError, match=rf"{number}\.csv:3: a field opens a double quote"):
            read(path)


def test_an_unclosed_quote_is_found_in_the_line_where_it_opens(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(
        'text,label\n"two\nlines, ""quoted""",b\n"a ""good"" one\nof two","and\n bad,x\n'
    )
    with pytest.raises(DataError, match=r"a\.csv:5: a field opens"):
        read(path.rename(tmp_path / "a.csv"))
    path.write_text('text,label\na 12"" record,music\n"b"x,music\n')
    with pytest.raises(DataError, match=r"a\.csv:3: a field opens"):
        read(path)


def test_csv_as_tools_write_it(tmp_path: Path) -> None:
    rows = [
        ["t" * 200_000, "l"],
        ['say "hi",\nthen\r\ngo', "m"],
        ['12" disc', "n"],
        ["a;b\tc", "o"],
    ]
    wanted = [Example(text, label) for text, label in rows]
    for delimiter, ending in ((",", "\n"), (";", "\r\n"), ("\t", "\n"), (",", "\r\n")):
        path = tmp_path / "a.csv"
        with path.open("w", encoding="utf-8-sig", newline="") as stream:
            writer = csv.writer(stream, delimiter=delimiter, lineterminator=ending)
            writer.writerows([["text", "label"], *rows])
            stream.write(ending)
        found = read(path)
        assert found == wanted
        assert [e.row for e in found] == [2, 3, 6, 7]  # lines, not rows
    with gzip.open(tmp_path / "b.tsv.gz", "wt") as stream:
        stream.write("\n\ttext \tlabel\n0\ta\tb\n")  # an index without a name
    assert read(tmp_path / "b.tsv.gz") == [Example("a", "b")]
    (tmp_path / "mac.csv").write_bytes(b"text,label\ra,b\rc,d\r")
    assert [e.row for e in read(tmp_path / "mac.csv")] == [2, 3]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"text,label\n", "holds no example"),
        (b"text,label\na,b\n\nc,d,e\n", r"a\.csv:4 has 3 fields, the header has 2"),
        (b'text,label\n"a\nb",c\nd\n', r"a\.csv:4 has 1 fields, the header has 2"),
        (b"text,label,text\na,b,c\n", r"a\.csv:1: the header has the column 'text' twice"),
        ("text,label\nа,b\n".encode("utf-16"), "is UTF-16"),
        ("text,label\na,b\n".encode("utf-16-le"), r"a\.csv:1 is no UTF-8 text"),
        (b"text,label\na,b\ncaf\xe9,b\n", r"a\.csv:3 is not UTF-8"),
        (b'text,label\na, "b"\n', r"a\.csv:2: a field has a space before its"),
        (b'text, "label"\na,b\n', r"a\.csv:1: a field has a space before its"),
        (b"text,label\na,\n", r"a\.csv:2 has an empty 'label'"),
        (b"words|label\na|b\n", r"no column 'text'.*columns present: words\|label"),
    ],
)
def test_a_csv_file_that_cannot_be_right_is_refused_with_its_line(
    content: bytes, words: str, tmp_path: Path
) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=words):
        read(tmp_path / "a.csv")


# ---------------------------------------------------------------- conversations, instructions
TURNS = [("user", "hello"), ("assistant", "good day"), ("user", "and?"), ("assistant", "done")]
OPENAI = [{"role": role, "content": text} for role, text in TURNS]
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}[r], "value": t} for r, t in TURNS]
SAID = Example("user: hello\nassistant: good day\nuser: and?", "done")


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
    with pytest.raises(
        DataError, match=r"a\.jsonl:1: 'messages' is a conversation.*'label' holds one"
    ):
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


# --------------------------------------------------------------------------------------- JSON
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
