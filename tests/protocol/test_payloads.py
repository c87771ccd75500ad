"""What channels say in a message, and the settings in its header: read strictly, whoever wrote them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.exchange.packing import pack
from heterotune_flwr.flower import ConfigRecord, RecordDict
from heterotune_flwr.protocol.messages import EvaluateRequest, Header, TrainReply, TrainRequest
from heterotune_flwr.protocol.payloads import Payload, add_payloads, read_payloads
from heterotune_flwr.protocol.wire import read_field
from heterotune_flwr.schema import MethodConfig, TrainConfig

NUMBERS = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}


def message(payloads):
    config = ConfigRecord({})
    content = RecordDict({"config": config})
    add_payloads(content, config, payloads)
    return content, config


def test_every_message_with_channels_brings_them_as_they_were():
    told = {"one": Payload(NUMBERS, {"n": 3, "of": ["a", "ü"]}, "fp32"), "other": Payload()}
    header = Header("run", 0, MethodConfig(output=4))
    sent = (
        TrainRequest(header, {}, "", None, [], channels=told),
        EvaluateRequest(header, {}, "", None, ["global"], told),
        TrainReply("c", "t", 1, "", {}, {}, channels=told),
    )
    for one in sent:
        read = type(one).from_content(one.to_content("bf16")).channels
        assert {name: payload.digest for name, payload in read.items()} == {
            name: payload.digest for name, payload in told.items()
        }
        assert read["one"].fields == told["one"].fields
        np.testing.assert_array_equal(read["one"].tensors["x"], NUMBERS["x"])


def test_a_payload_is_named_by_all_that_it_says():
    said = Payload(NUMBERS, {"n": 3})
    others = (
        replace(said, fields={"n": 4}),
        replace(said, tensors={}),
        replace(said, tensors={"x": NUMBERS["x"] + 1}),
        replace(said, tensors={"y": NUMBERS["x"]}),
    )
    assert len({said.digest, *(other.digest for other in others)}) == 5
    assert replace(said, codec="fp32", effort="fit").digest == said.digest  # how it travels


@pytest.mark.parametrize(
    "name", ["", "a b", "../x", "a/b", "\x1b[2J", "x" * 10_000, "[/x]", "a\u202eb", "."]
)
def test_names_that_are_no_ids_are_refused(name):
    content, config = message({})
    config[f"channel.{name}"] = "{}"
    with pytest.raises(ExchangeError, match="malformed"):
        read_payloads(content, config)


def test_too_many_channels_or_one_that_says_nothing_are_refused():
    many = {f"c{n}": Payload() for n in range(33)}
    with pytest.raises(ExchangeError, match="malformed"):
        read_payloads(*message(many))
    many.popitem()
    assert len(read_payloads(*message(many))) == 32
    content, config = message({})
    content["channel.silent"] = pack(NUMBERS, "fp32")  # numbers that no fields announce
    with pytest.raises(ExchangeError, match="malformed"):
        read_payloads(content, config)


@pytest.mark.parametrize("said", ["[]", "3", "null", '"x"', "{", "", "[" * 100_000, 7, b"{}"])
def test_fields_that_are_no_object_are_refused(said):
    content, config = message({})
    config["channel.one"] = said
    with pytest.raises(ExchangeError, match=r"one"):
        read_payloads(content, config)


@pytest.mark.parametrize("text", ["\ud800", "a \udfff b", ["\udead\ud83d"]])
def test_half_a_surrogate_pair_is_refused(text):
    content, config = message({"one": Payload(fields={"answers": text})})
    with pytest.raises(
        ExchangeError, match="one"
    ):  # no tokenizer takes it, and all clients would be sent it
        read_payloads(content, config)


def test_other_letters_are_read_as_they_were():
    fields = {"answers": ["\U0001f600 ü \u202e\x00", "\\ud800"]}
    assert read_payloads(*message({"one": Payload(fields=fields)}))["one"].fields == fields


def test_a_number_beyond_all_floats_is_refused():
    fields = read_payloads(*message({"one": Payload(fields={"n": 10**400})}))["one"].fields
    with pytest.raises(ExchangeError, match="too large"):
        read_field(fields, "n", float)


def test_a_record_of_another_kind_is_refused():
    content, config = message({"one": Payload(fields={"n": 1})})
    content["channel.one"] = ConfigRecord({"x": 1})
    with pytest.raises(ExchangeError, match="no arrays"):
        read_payloads(content, config)


@given(
    st.dictionaries(st.text(max_size=8), st.one_of(st.text(max_size=9), st.integers()), max_size=4)
)
def test_whatever_a_record_says_it_is_read_or_refused(said):
    content, config = message({})
    for key, value in said.items():
        if -(2**63) <= (value if isinstance(value, int) else 0) < 2**63:
            config[f"channel.{key}"] = value
    try:
        found = read_payloads(content, config)
    except ExchangeError:
        return
    assert all(isinstance(payload.fields, dict) for payload in found.values())


# ------------------------------------------------------------------------------------- the header

TRAIN = TrainConfig(local_steps=7, warmup_ratio=0.25, losses={"mine": {"weight": 1}})
HEADER = Header("run", 3, MethodConfig(output=None), 2, TRAIN)


def test_a_header_brings_all_settings_as_they_were():
    assert Header.from_config(HEADER.to_config()) == HEADER


@pytest.mark.parametrize(
    ("section", "change", "says"),
    [
        ("train", {"local_steps": 1.5}, "local_steps"),
        ("train", {"local_steps": True}, "local_steps"),
        ("train", {"local_steps": "7"}, "local_steps"),
        ("train", {"local_steps": None}, "local_steps"),
        ("train", {"learning_rate": "fast"}, "learning_rate"),
        ("train", {"learning_rate": 10**400}, "learning_rate"),
        ("train", {"cache_states": 1}, "cache_states"),
        ("train", {"losses": ["mine"]}, "losses"),
        ("train", {"optimizer": 3}, "optimizer"),
        ("train", {"more": 1}, "TrainConfig"),
        ("method", {"latent": 8.0}, "latent"),
        ("method", {"output": "4"}, "output"),
        ("method", {"more": 1}, "MethodConfig"),
    ],
)
def test_settings_of_another_kind_are_refused(section, change, says):
    record = HEADER.to_config()
    record[section] = json.dumps({**json.loads(record[section]), **change})
    with pytest.raises(ExchangeError, match=says):
        Header.from_config(record)


def test_a_whole_number_may_stand_for_a_number_and_nothing_may_be_missing():
    record = HEADER.to_config()
    settings = asdict(TRAIN)
    record["train"] = json.dumps({**settings, "learning_rate": 1})
    read = Header.from_config(record).train
    assert (read.learning_rate, type(read.learning_rate)) == (1.0, float)
    for name in settings:
        record["train"] = json.dumps({key: v for key, v in settings.items() if key != name})
        with pytest.raises(ExchangeError, match="TrainConfig"):
            Header.from_config(record)
    for text in ("[]", "null", "{", "7"):
        with pytest.raises(ExchangeError, match="train"):
            Header.from_config({**record, "train": text})
    del record["train"]
    with pytest.raises(ExchangeError, match="train"):
        Header.from_config(record)
