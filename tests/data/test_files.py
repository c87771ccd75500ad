"""Other people's files: values that are no text, CSV as it comes, conversations and instructions."""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import json
from pathlib import Path

import pytest
from own_files import SECRET, lines, parquet, read

from heterotune_flwr.alignment.public_texts import Anchor, load_anchors, read_anchors
from heterotune_flwr.data import sources
from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.partition import client_examples
from heterotune_flwr.data.sources import global_test
from heterotune_flwr.errors import DataError
from heterotune_flwr.new.table import look
from heterotune_flwr.schema import AlignmentConfig, DataConfig


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


def test_a_column_is_found_whatever_its_case_and_the_one_spelt_so_first(tmp_path: Path) -> None:
    row = {" Text": "t", "LABEL": "l", "Client": "c", "References": ["r"]}
    found = read(lines(tmp_path / "a.jsonl", [row, {**row, "label": "spelt so"}]))
    assert found == [Example("t", "l", "c", ("r",)), Example("t", "spelt so", "c", ("r",))]
    path = lines(tmp_path / "b.jsonl", [{"Review": "t", "Mood": "l"}])
    assert read(path, text_field="review", label_field="MOOD") == [Example("t", "l")]
    assert look(path).check("mood", "--label") == "Mood"
    with pytest.raises(DataError, match=r"no column 'label'.*LABEL, Label"):
        read(lines(tmp_path / "c.jsonl", [{"text": "t", "Label": "l", "LABEL": "m"}]))


def test_layouts_are_known_whatever_their_columns_case(tmp_path: Path) -> None:
    asked = {"Instruction": "do", "Input": "this", "Output": "done"}
    assert read(lines(tmp_path / "a.jsonl", [asked])) == [Example("do\n\nthis", "done")]


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


def test_anchors_columns_are_found_whatever_their_case(tmp_path: Path) -> None:
    rows = [{"Text": f"anchor {n}", "ANSWER ": f"answer {n}"} for n in range(12)]
    found = read_anchors(AlignmentConfig(anchors=str(lines(tmp_path / "a.jsonl", rows))))
    assert found[3] == Anchor("anchor 3", "answer 3")


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


# --------------------------------------------------------------------------------------- JSON
