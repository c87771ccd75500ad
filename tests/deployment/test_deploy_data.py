"""A node's own data in every form, what it reports, and the code it accepts."""

from __future__ import annotations

import json

import pytest

from heterotune_flwr.client.identify import Identity, check_code
from heterotune_flwr.client.identity import COUNTED
from heterotune_flwr.data.sources import read_examples
from heterotune_flwr.errors import ConfigError, DataError
from heterotune_flwr.program_version import code_hash
from heterotune_flwr.schema import DataConfig

ROWS = [{"q": f"what is {i}?", "a": f"number {i}"} for i in range(2500)]
COLUMNS = {"text_field": "q", "label_field": "a"}


def pairs(path, **settings):
    return [(e.text, e.label) for e in read_examples(path, DataConfig(**{**COLUMNS, **settings}))]


def save(rows, form, folder):
    if form == "jsonl":
        path = folder / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = folder / "data.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        from datasets import Dataset, DatasetDict

        path = folder / form
        table = Dataset.from_list(rows)
        (
            table if form == "saved" else DatasetDict(train=table, other=table.select([0]))
        ).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("form", ["jsonl", "parquet", "saved", "splits"])
def test_every_form_gives_the_same_examples(form, tmp_path):
    assert pairs(save(ROWS, form, tmp_path)) == [(row["q"], row["a"]) for row in ROWS]


@pytest.mark.parametrize("form", ["jsonl", "parquet", "saved"])
def test_chat_messages_in_every_form(form, tmp_path):
    one = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    more = [{"role": "system", "content": "be short"}, *one, {"role": "user", "content": "and?"},
            {"role": "assistant", "content": "done"}, {"role": "user", "content": "thanks"}]  # fmt: skip
    path = save([{"messages": one}, {"messages": more}], form, tmp_path)
    assert pairs(path, text_field="messages", label_field="label") == [
        ("hello", "good day"),
        ("system: be short\nuser: hello\nassistant: good day\nuser: and?", "done"),
    ]


def test_a_name_that_does_not_tell_the_form(tmp_path):
    path = save(ROWS[:3], "parquet", tmp_path).rename(tmp_path / "data.bin")
    with pytest.raises(DataError, match=r"data\.format"):
        pairs(path)
    assert len(pairs(path, format="parquet")) == 3
    with pytest.raises(DataError, match="choose one of jsonl"):
        pairs(path, format="xml")


def test_an_empty_turn_is_told_of_the_column_that_is_there(tmp_path):
    cases = {"hello": " ", " ": "good day"}
    for said, reply in cases.items():
        turns = [{"role": "user", "content": said}, {"role": "assistant", "content": reply}]
        path = save([{"messages": turns}], "jsonl", tmp_path)
        with pytest.raises(DataError, match=r"'messages'") as caught:
            pairs(path, text_field="messages", label_field="response")
        assert "response" not in str(caught.value)


def test_a_missing_column_is_told_with_the_nodes_own_setting(tmp_path):
    path = save(ROWS[:1], "jsonl", tmp_path)
    with pytest.raises(DataError, match=r"data\.text_field; text-field in a node's settings"):
        pairs(path, text_field="other")


def test_errors_never_quote_the_data(tmp_path):
    secret = "SECRET-4711"
    cases = {
        "a.jsonl": json.dumps({"q": [{"role": "user", "content": secret}], "a": "x"}),
        "b.jsonl": json.dumps({"q": [{"role": "user", "text": secret}], "a": "x"}),
        "c.jsonl": json.dumps({"q": secret, "b": secret}),
        "d.jsonl": '{"q": "' + secret,
        "e.parquet": "PAR1" + secret,
    }
    for name, text in cases.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError) as caught:
            pairs(tmp_path / name)
        assert secret not in str(caught.value), name
        assert name in str(caught.value)


def test_a_node_may_tell_counts_and_loss_only(tmp_path):
    everything = {
        "examples": 9.0, "steps": 3.0, "learning_rate": 0.1, "loss": 1.0, "accuracy": 0.5, "seconds": 2.0,
        "peak_memory_mb": 9.0, "personal_loss": 1.0, "personal_accuracy": 0.5, "personal_examples": 4.0,
        "global_loss": 1.0, "global_examples": 7.0, "global_f1": 0.1,
    }  # fmt: skip
    identity = Identity("x", None, DataConfig(), tmp_path, report="counts-and-loss-only")
    told = identity.reported(everything)
    assert set(told) == {
        *COUNTED, "personal_loss", "personal_examples", "global_loss", "global_examples",
    }  # fmt: skip
    assert Identity("x", None, DataConfig(), tmp_path).reported(everything) == everything


def test_a_node_refuses_code_it_has_not_installed():
    check_code("")
    check_code(code_hash())
    with pytest.raises(ConfigError, match="install the server's version on the node"):
        check_code("0123456789abcdef")
