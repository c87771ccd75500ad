"""Columns of a file that nobody described."""

from __future__ import annotations

import csv
import json

import pytest

from heterotune_flwr.data.columns import likely_columns, text_column
from heterotune_flwr.errors import DataError


def write(path, rows):
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def many(*columns, **values):
    return [
        {**dict.fromkeys(columns, "x"), **{k: v(n) for k, v in values.items()}} for n in range(30)
    ]


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        (many("text", "label", "client"), {}),
        (
            many("Review", "Sentiment", "site"),
            {"text_field": "Review", "label_field": "Sentiment", "client_field": "site"},
        ),
        (many("query", "reply", "id"), {"text_field": "query", "label_field": "reply"}),
        (
            many(a=lambda n: f"a long enough text of number {n}", b=lambda n: str(n % 3), c=str),
            {"text_field": "a", "label_field": "b"},
        ),
    ],
)  # fmt: skip
def test_by_their_names_else_by_what_they_hold(tmp_path, rows, found):
    assert likely_columns(write(tmp_path / "own.csv", rows)) == found


def test_layouts_that_are_known_are_left_alone(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"instruction": "a", "input": "b", "output": "c"}))
    assert likely_columns(path) == {}


def test_what_cannot_be_told_is_refused_with_the_columns(tmp_path):
    path = write(tmp_path / "own.csv", many(a=lambda n: f"text {n}", b=str))
    with pytest.raises(DataError, match="to be the label: it has a, b"):
        likely_columns(path)


def test_texts_alone_have_a_column_too(tmp_path):
    assert text_column(write(tmp_path / "own.csv", many("id", "Body"))) == "Body"
    assert text_column(write(tmp_path / "two.csv", many(a=str, b=lambda n: "long " * 9))) == "b"
