"""Who counts as harmed, and what a case's files are made of."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks.science.no_harm import summary, worse
from benchmarks.science.own_cases import write_case


def client(took: str, gain: float, error: float = 0.01, other: str = "bare"):
    pair = {"loss": [gain, error], "score": [0.0, error]}
    means = {"bare": 1.0, "alone": 0.5, "federated": 2.0}
    return {"took": took, "rows": 200, "type": "a@bf16", "loss": means, "score": means,
            "gain": {f"{took} {other}": pair}}  # fmt: skip


def test_harm_is_what_is_sure_among_all_clients():
    level = 0.05
    one = {"a": client("alone", -0.02)}  # two standard errors: 2.3 %
    assert worse(one, "bare", "loss") == ["a"]
    many = one | {str(n): client("alone", 0.1) for n in range(3)}
    assert worse(many, "bare", "loss") == []  # 2.3 % is not below a quarter of 5 %
    assert worse(many | {"b": client("alone", -0.04)}, "bare", "loss") == ["b"]
    assert worse({"a": client("bare", -1.0, other="alone")}, "bare", "loss") == []  # it is bare
    assert worse({"a": client("alone", 0.0, 0.0)}, "bare", "loss") == []
    found = summary(
        {"tiny chat 20 5": {"a": client("alone", -1.0), "b": client("bare", 1.0, other="alone")}},
        ["tiny chat 21 5"],
    )
    row = found["tiny chat"]
    assert found["all"] == {**row, "worse_than_bare": found["all"]["worse_than_bare"]}
    assert (row["share_worse_than_bare"], row["share_worse_than_alone"]) == (0.5, 0.0)
    assert (row["below_bare"], row["below_alone"]) == (
        {"loss": 1, "score": 0},
        {"loss": 0, "score": 0},
    )
    assert row["took"] == {"bare": 1, "alone": 1, "federated": 0}
    assert row["score"] == {"bare": 1.0, "alone": 0.5, "federated": 2.0, "taken": 0.75}
    assert (row["mean_gain"], found["level"]) == (-0.25, level)
    assert (found["seeds"], found["cells"]) == ([20], ["tiny chat 20 5"])
    assert found["missing"] == ["tiny chat 21 5"]


def test_tasks_of_different_families_have_an_owner_each(tmp_path):
    rows = [
        {
            "task": f"task{n % 4}",
            "family": "ab"[n % 2],
            "instruction": "Copy.",
            "input": str(n),
            "output": str(n),
        }
        for n in range(200)
    ]
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words, owners = write_case("instructions", tmp_path, path)
    assert owners == ["a/task0", "b/task1"]
    train = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    test = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    assert {row["client"] for row in train} == {row["client"] for row in test} == set(owners)
    assert (len(train), len(test)) == (80, 20)
    assert not {row["text"] for row in train} & {row["text"] for row in test}
    assert f"data.train={tmp_path / 'train.jsonl'}" in words
    with pytest.raises(SystemExit, match="--instructions"):
        write_case("instructions", tmp_path, None)


def test_what_is_asked_twice_or_nearly_is_dealt_once(tmp_path):
    asked = [" ".join(f"{letter}{n}" for letter in "wxyzabcdefgh") for n in range(30)]
    again = [text.upper() + "!" for text in asked]
    nearly = [f"{text} twice" for text in asked]
    rows = [
        {"task": "only", "instruction": "Copy.", "input": text, "output": str(n)}
        for n, text in enumerate([*asked, *again, *nearly])
    ]
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_case("instructions", tmp_path, path)
    files = [(tmp_path / f"{name}.jsonl").read_text() for name in ("train", "test")]
    assert sorted(re.findall(r"w\d+", "".join(files))) == sorted(text.split()[0] for text in asked)
