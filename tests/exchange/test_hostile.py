"""Records and messages of somebody who means harm: refused in one line, before the memory they announce is taken."""

from __future__ import annotations

import json
import random
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.reliability import fuzz_target
from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.exchange.manifest import Expected, Manifest
from heterotune_flwr.exchange.packing import pack, unpack
from heterotune_flwr.flower import Array, ArrayRecord
from heterotune_flwr.protocol.messages import TrainReply

GOOD = {"format": 2, "codec": "fp32", "tensors": [["a", [2, 3]]]}
SHAPES = {"a": (2, 3)}


def compact(content) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


def record_of(manifest: bytes, data) -> ArrayRecord:
    return ArrayRecord(
        {
            "manifest": Array(np.frombuffer(manifest, np.uint8).copy()),
            "data": Array(np.asarray(data)),
        }
    )


def test_the_good_one_passes_so_the_refusals_mean_something():
    record = record_of(compact(GOOD), np.zeros(6, "<f4"))
    assert unpack(record, Expected(SHAPES, {"fp32"}))["a"].shape == (2, 3)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (
            {k: v for k, v in GOOD.items() if k != "format"},
            "format 1, this side reads format 2; install",
        ),
        ({**GOOD, "format": 3}, "format 3, this side reads"),
        ({**GOOD, "format": True}, "format unknown"),
        ({**GOOD, "format": 2.0}, "format unknown"),
        ({**GOOD, "more": 1}, "not in its one form"),
        ({"codec": "fp32", **GOOD}, "not in its one form"),
        ({**GOOD, "tensors": {"a": [2, 3]}}, "must list"),
        ({**GOOD, "tensors": [["a"]]}, "no .name, shape."),
        ({**GOOD, "tensors": [["b", [3]], ["a", [3]]]}, "twice or out of order"),
        ({**GOOD, "tensors": [["a", [3]], ["a", [3]]]}, "twice or out of order"),
        ({**GOOD, "tensors": [["a", [True, 6]]]}, "impossible shape"),
        ({**GOOD, "tensors": [["a", [-2, -3]]]}, "impossible shape"),
        ({**GOOD, "tensors": [["a", [10**400]]]}, "impossible shape"),
        ({**GOOD, "tensors": [["a", [0, 2**30, 2**30]]]}, "impossible shape"),
        ({**GOOD, "tensors": [["a", [1] * 9]]}, "impossible shape"),
        ({**GOOD, "tensors": [["\ud800", [6]]]}, "half a letter"),
        ({**GOOD, "tensors": [["n" * 501, [6]]]}, "1 to 500 letters"),
        (compact(GOOD)[:-1], "malformed"),
        (compact(GOOD).replace(b"[2,3]", b"[2,NaN]"), "impossible shape"),
        (compact(GOOD).replace(b"[2,3]", b"[2, 3]"), "not in its one form"),
        (compact(GOOD).replace(b'"a"', b'"\xc3\xa4"'), "malformed"),
        (compact(GOOD).replace(b"[2,3]", b"[6]],[" + b"1" * 5000), "malformed"),
        (b"[" * 100_000, "malformed"),
        (b'{"tensors":' + b"[" * 100_000, "malformed"),
        (b" " * (1 << 20) + b"1", "more than 1048576"),
    ],
)
def test_manifests_have_one_form(manifest, message):
    text = manifest if isinstance(manifest, bytes) else compact(manifest)
    with pytest.raises(ExchangeError, match=message) as caught:
        unpack(record_of(text, np.zeros(6, "<f4")))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({**GOOD, "codec": "fp16"}, "sends codec 'fp16', this run expects fp32"),
        ({**GOOD, "tensors": [["a", [3, 2]]]}, r"sends a as \[3, 2\], expected \[2, 3\]"),
        ({**GOOD, "tensors": [["b", [6]]]}, "unexpected tensor 'b'"),
        ({**GOOD, "tensors": [["a", [2, 3]], ["b", [2**20]]]}, "unexpected tensor 'b'"),
    ],
)
def test_what_was_not_asked_for_is_refused_before_it_is_decoded(manifest, message):
    content = TrainReply("c", "t", 1, "", {}, {}).to_content("fp32")
    content["deltas"] = record_of(compact(manifest), np.zeros(6, "<f4"))
    with pytest.raises(ExchangeError, match=message):
        TrainReply.from_content(content, Expected(SHAPES, {"fp32"}))


def announce(header: bytes, body: bytes = b"\0" * 24, shape=(6,), dtype="float32") -> Array:
    padded = header + b" " * (117 - len(header)) + b"\n"
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + padded + body
    return Array(dtype, shape, "numpy.ndarray", data)


HEADER = b"{'descr': '<f4', 'fortran_order': False, 'shape': (6,), }"


def test_the_hand_made_header_is_as_numpy_writes_it():
    record = record_of(compact(GOOD), np.zeros(6, "<f4"))
    record["data"] = announce(HEADER)
    assert record["data"].data == Array(np.zeros(6, "<f4")).data
    assert unpack(record)["a"].shape == (2, 3)


@pytest.mark.parametrize(
    "array",
    [
        announce(HEADER.replace(b"(6,)", b"(1099511627776,)")),
        announce(HEADER.replace(b"(6,)", b"(1099511627776,)"), shape=(1099511627776,)),
        announce(HEADER.replace(b"(6,)", b"(2, 3)")),
        announce(HEADER.replace(b"(6,)", b"(-6,)")),
        announce(HEADER.replace(b"'<f4'", b"'|O8'")),
        announce(HEADER.replace(b"'<f4'", b"'>f4'")),
        announce(HEADER.replace(b"False", b"True")),
        announce(HEADER.replace(b"(6,)", b"(6,)*9")),
        announce(HEADER, body=b"\0" * 23),
        announce(HEADER, body=b"\0" * 25),
        announce(HEADER, shape=(7,)),
        announce(HEADER, dtype="int8"),
        Array("float32", (6,), "torch.Tensor", announce(HEADER).data),
        Array("float32", (6,), "numpy.ndarray", b"\x93NUMPY\x01\x00"),
        Array("float32", (6,), "numpy.ndarray", b"\x93NUMPY\x02\x00" + b"\xff" * 40),
    ],
)
def test_array_headers_are_not_believed(array):
    record = record_of(compact(GOOD), np.zeros(6, "<f4"))
    record["data"] = array
    with pytest.raises(ExchangeError, match="packed array 'data'"):
        unpack(record)


def test_another_array_in_the_record_is_refused():
    record = record_of(compact(GOOD), np.zeros(6, "<f4"))
    record["more"] = Array(np.zeros(1))
    with pytest.raises(ExchangeError, match="and no others"):
        unpack(record)


@pytest.mark.parametrize("expected", [None, Expected(SHAPES), Expected(None, {"topk:0.001"})])
def test_a_few_bytes_that_announce_a_billion_numbers_take_no_memory(expected):
    """topk's length is a share of what is announced: 4 MB of zeros would stand for 4 GiB."""
    manifest = Manifest("topk:0.001", (("a", (1 << 26,)),)).to_bytes()
    count = -(-(1 << 26) // 1000)
    record = record_of(manifest, np.zeros(count * 6, np.uint8))
    tracemalloc.start()
    try:
        with pytest.raises(ExchangeError, match=r"are announced for|expected"):
            unpack(record, expected)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def with_data(codec: str, count: int, data: bytes) -> ArrayRecord:
    manifest = Manifest(codec, (("x", (count,)),)).to_bytes()
    return record_of(manifest, np.frombuffer(data, np.uint8).copy())


ONE, NAN, INF, TINY = b"\x80\x3f", b"\xc0\x7f", b"\x80\x7f", b"\x01\x00"


@pytest.mark.parametrize(
    ("codec", "count", "data", "message"),
    [
        ("int8", 2, ONE + b"\x7f", "were sent"),
        ("int8", 2, ONE + ONE + b"\x7f\x00", "were sent"),
        ("int8", 2, ONE + b"\x7e\x00", "do not fit its scale"),
        ("int8", 2, ONE + b"\x80\x7f", "below -127"),
        ("int8", 2, b"\x00\x00\x7f\x00", "do not fit its scale"),
        ("int8", 2, NAN + b"\x01\x00", "do not fit its scale"),
        ("int8", 2, INF + b"\x7f\x00", "scale is negative, infinite"),
        ("int8", 2, b"\x80\xbf\x7f\x00", "scale is negative, infinite"),
        ("int8", 2, TINY + b"\x7f\x00", "too small"),
        ("nf4", 1, ONE + b"\x1f", "half a byte"),
        ("nf4", 2, ONE + b"\x77", "do not fit its scale"),
        ("nf4", 2, b"\x00\x00\x78", "do not fit its scale"),
        ("topk:0.5", 4, b"\x00\x00\x00\x00" + ONE + ONE, "positions must rise"),
        ("topk:0.5", 4, b"\x01\x00\x00\x00" + ONE + ONE, "positions must rise"),
        ("topk:0.5", 4, b"\x00\x00\x04\x00" + ONE + ONE, "below 4"),
        ("topk:0.5", 4, b"\x00\x00\x01\x00" + ONE, "were sent"),
    ],
)
def test_only_what_the_writer_writes_is_read(codec, count, data, message):
    with pytest.raises(ExchangeError, match=message):
        unpack(with_data(codec, count, data))


def test_the_same_bytes_made_good_are_read():
    np.testing.assert_array_equal(unpack(with_data("int8", 2, ONE + b"\x7f\x00"))["x"], [1, 0])
    np.testing.assert_array_equal(unpack(with_data("nf4", 1, ONE + b"\x0f"))["x"], [1])
    good = with_data("topk:0.5", 4, b"\x00\x00\x03\x00" + ONE + ONE)
    np.testing.assert_array_equal(unpack(good)["x"], [1, 0, 0, 1])
    assert np.isnan(unpack(with_data("int8", 2, NAN + b"\x00\x00"))["x"]).all()


# ----------------------------------------------------------------------------------------- fuzzing


@given(data=st.binary(max_size=400))
@settings(max_examples=300, deadline=None)
def test_no_bytes_break_the_reader(data):
    fuzz_target.check(data)


def test_mutated_records_and_messages_are_refused_or_read_back_the_same():
    """A fixed sample of what ``python -m benchmarks.reliability.fuzz_exchange`` does a million times."""
    seeds, rng = fuzz_target.seeds(), random.Random(0)
    fuzz_target.counts.clear()
    for data in seeds:
        fuzz_target.check(data, measure=True)
    for index in range(1500):
        changed = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(0, 3)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        fuzz_target.check(bytes(changed), measure=index % 16 == 0)
    assert fuzz_target.counts["accepted"] > 100
    assert fuzz_target.counts["refused"] > 500


def test_a_reader_that_believes_too_much_is_found(monkeypatch):
    """The target must be able to fail: without its check, int8 reads codes its writer never makes."""
    from heterotune_flwr.exchange import blockwise

    monkeypatch.setattr(blockwise, "check_codes", lambda *_: None)
    with pytest.raises(AssertionError):
        fuzz_target.check(bytes([2, 31, 3, 9, 9, 9]))


def test_errors_of_packed_tensors_stay_one_line():
    record = pack({"a": np.zeros(6)}, "fp32")
    record["x" * 100_000] = Array(np.zeros(1))
    with pytest.raises(ExchangeError) as caught:
        unpack(record)
    assert len(str(caught.value)) < 200
