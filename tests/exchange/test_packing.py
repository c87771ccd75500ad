"""Packing against numpy oracles, and everything a malformed record must not get away with."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open

from heterotune_flwr.alignment.maps import resolve_output
from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.exchange.packing import (
    content_bytes,
    pack,
    payload_bytes,
    round_trip,
    tensor_digest,
    unpack,
)
from heterotune_flwr.exchange.storage import load_tensors, save_tensors
from heterotune_flwr.flower import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from heterotune_flwr.protocol.messages import (
    EvaluateReply,
    EvaluateRequest,
    Header,
    TrainReply,
    TrainRequest,
)
from heterotune_flwr.protocol.payloads import Payload
from heterotune_flwr.protocol.queries import (
    AlignReply,
    AlignRequest,
    DescribeReply,
    DescribeRequest,
)
from heterotune_flwr.protocol.wire import (
    ERROR_MAPS_MISSING,
    RemoteError,
    error_content,
    pack_mask,
    unpack_mask,
)
from heterotune_flwr.schema import AlignmentConfig, MethodConfig

arrays = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5),
    elements=st.floats(width=32),
)
trees = st.dictionaries(st.text(min_size=1, max_size=8), arrays, max_size=5)


@given(tensors=trees)
@settings(max_examples=80, deadline=None)
def test_fp32_is_exact_down_to_nan_and_shapes(tensors):
    back = unpack(pack(tensors, "fp32"))
    assert set(back) == set(tensors)
    for name, value in tensors.items():
        assert back[name].shape == value.shape
        np.testing.assert_array_equal(back[name], value)


@given(tensors=trees, codec=st.sampled_from(["bf16", "fp16", "fp32"]))
@settings(max_examples=80, deadline=None)
def test_round_trip_is_what_the_receiver_sees_and_a_fixed_point(tensors, codec):
    seen = round_trip(tensors, codec)
    back = unpack(pack(tensors, codec))
    again = round_trip(seen, codec)
    for name in tensors:
        np.testing.assert_array_equal(seen[name], back[name])
        np.testing.assert_array_equal(seen[name], again[name])
    assert tensor_digest(seen) == tensor_digest(back)


@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
@settings(max_examples=100, deadline=None)
def test_bf16_rounds_to_the_nearest_even_neighbour(bits):
    values = np.array(bits, dtype=np.uint32).view(np.float32)
    got = unpack(pack({"x": values}, "bf16"))["x"]
    for value, rounded in zip(values, got, strict=True):
        if not np.isfinite(value):
            assert np.isnan(rounded) if np.isnan(value) else rounded == value
            continue
        upper = int(np.float32(value).view(np.uint32)) >> 16
        neighbours = np.array([upper << 16, (upper + 1) << 16], dtype=np.uint64)
        low, high = (np.uint32(n & 0xFFFFFFFF).view(np.float32) for n in neighbours)
        if not np.isfinite(high):  # above the largest bfloat16: half way up is infinity
            assert rounded in (low, high)
            continue
        below, above = abs(np.float64(value) - low), abs(np.float64(high) - value)
        nearest = low if below < above or (below == above and upper % 2 == 0) else high
        assert rounded == nearest


def test_bf16_agrees_with_torch():
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).normal(size=4000).astype(np.float32) * 10.0
    oracle = torch.from_numpy(values).to(torch.bfloat16).to(torch.float32).numpy()
    np.testing.assert_array_equal(unpack(pack({"x": values}, "bf16"))["x"], oracle)


def test_bytes_are_two_per_number_plus_a_manifest():
    tensors = {"a": np.zeros((100, 50)), "b": np.zeros(7)}
    record = pack(tensors, "bf16")
    assert len(record) == 2
    assert 2 * 5007 < payload_bytes(record) < 2 * 5007 + 500
    content = RecordDict({"t": record, "config": ConfigRecord({"name": "abc", "n": 1})})
    assert content_bytes(content) == payload_bytes(record) + 4 + 3 + 1 + 8


def test_order_of_names_does_not_show():
    a, b = np.ones(2, np.float32), np.zeros(3, np.float32)
    one, other = pack({"a": a, "b": b}, "fp32"), pack({"b": b, "a": a}, "fp32")
    assert [one[k].data for k in one] == [other[k].data for k in other]
    assert tensor_digest({"a": a, "b": b}) == tensor_digest({"b": b, "a": a})
    assert tensor_digest({"a": a}) != tensor_digest({"a": a.reshape(1, 2)})


def compact(manifest) -> bytes:
    return json.dumps(manifest, separators=(",", ":")).encode()


def record_with(manifest, data=None) -> ArrayRecord:
    text = manifest if isinstance(manifest, bytes) else compact(manifest)
    values = np.zeros(6, "<f4") if data is None else data
    return ArrayRecord(
        {"manifest": Array(np.frombuffer(text, np.uint8).copy()), "data": Array(values)}
    )


GOOD = {"format": 2, "codec": "fp32", "tensors": [["a", [2, 3]]]}


@pytest.mark.parametrize(
    "record",
    [
        ArrayRecord(),
        record_with(b"\xff\xfe"),
        record_with(b"[" * 5000),
        record_with([]),
        record_with({"codec": "fp32"}),
        record_with({**GOOD, "codec": "pickle"}),
        record_with({**GOOD, "codec": 3}),
        record_with({**GOOD, "tensors": [["a", [2, 2]]]}),
        record_with({**GOOD, "tensors": [["a", [-2, -3]]]}),
        record_with({**GOOD, "tensors": [["a", [2, 3.0]]]}),
        record_with({**GOOD, "tensors": [["a", [True, 6]]]}),
        record_with({**GOOD, "tensors": [["a", [3]], ["a", [3]]]}),
        record_with({**GOOD, "tensors": [["", [6]]]}),
        record_with({**GOOD, "tensors": [[7, [6]]]}),
        record_with({**GOOD, "tensors": [["a", [2**40, 2**40]]]}),
        record_with({**GOOD, "tensors": 5}),
        record_with(GOOD, np.zeros((2, 3), "<f4")),
        record_with(GOOD, np.zeros(6, "<f8")),
        record_with({**GOOD, "codec": "bf16"}),
        ArrayRecord({"data": Array("float32", (6,), "numpy.ndarray", b"junk")}),
    ],
)
def test_malformed_records_are_refused(record):
    with pytest.raises(ExchangeError):
        unpack(record)


def test_a_good_record_passes_so_the_refusals_mean_something():
    assert unpack(record_with(GOOD))["a"].shape == (2, 3)


def test_pickled_arrays_are_refused():
    values = np.array([{"a": 1}], dtype=object)
    from io import BytesIO

    buffer = BytesIO()
    np.save(buffer, values, allow_pickle=True)
    evil = Array("object", (1,), "numpy.ndarray", buffer.getvalue())
    record = record_with(GOOD)
    record["data"] = evil
    with pytest.raises(ExchangeError, match="cannot be read"):
        unpack(record)


def test_unknown_codec_names_the_known_ones():
    with pytest.raises(ExchangeError, match="bf16, fp16, fp32"):
        pack({}, "int3")


def test_storage_is_atomic_and_says_when_a_file_is_broken(tmp_path):
    path = tmp_path / "deep" / "x.safetensors"
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
    save_tensors(path, tensors, {"k": "v"})
    np.testing.assert_array_equal(load_tensors(path)["a"], tensors["a"])
    assert [p.name for p in path.parent.iterdir()] == ["x.safetensors"]
    names = [f"k{n}" for n in range(8)]
    for order in (names, names[::-1]):
        save_tensors(path.with_stem(order[0]), tensors, dict.fromkeys(order, "é"))
    files = [path.with_stem(name).read_bytes() for name in ("k0", "k7")]
    assert files[0] == files[1]  # equal tensors and metadata, equal files
    np.testing.assert_array_equal(load_tensors(path.with_stem("k0"))["a"], tensors["a"])
    with safe_open(path.with_stem("k7"), "np") as stored:
        assert stored.metadata() == dict.fromkeys(names, "é")
    for name in ("k0", "k7"):
        path.with_stem(name).unlink()
    with pytest.raises(TypeError):
        save_tensors(path, tensors, {"k": 5})  # fails while writing: the old file stays
    np.testing.assert_array_equal(load_tensors(path)["a"], tensors["a"])
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ExchangeError, match="cannot be read"):
        load_tensors(path)
    with pytest.raises(ExchangeError, match="cannot be read"):
        load_tensors(tmp_path / "nothing.safetensors")


# ------------------------------------------------------------------------------------- messages

METHOD = MethodConfig(latent=8, output=4)
HEADER = Header("toy-heterotune-seed0", 3, METHOD, 5)
DESCRIPTION = DescribeReply(
    "client-0001", "tiny-a@nf4", "abc", "nf4", 96, 3, 1000, 2000, 300, 96, 32, ["x", "y"],
    {"slots.0.gate.bias": (3,), "slots.0.gate.weight": (3, 8)}, "f00", "abcd", 5,
)  # fmt: skip
TENSORS = {"slots.0.gate.bias": np.ones(3, np.float32)}
SAID = Payload({"x": np.ones((2, 3), np.float32)}, {"count": 2, "words": ["a", ""]}, "fp32")


def same(one, other) -> bool:
    """Equality of messages, arrays included."""
    left, right = vars(one), vars(other)
    for key, value in left.items():
        if isinstance(value, dict) and any(isinstance(v, np.ndarray) for v in value.values()):
            assert set(value) == set(right[key])
            for name in value:
                np.testing.assert_array_equal(value[name], right[key][name])
        elif key == "channels":
            digests = [{name: p.digest for name, p in side[key].items()} for side in (left, right)]
            assert digests[0] == digests[1]
        else:
            assert value == right[key], key
    return True


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (DescribeRequest(HEADER, True), ()),
        (DescribeRequest(HEADER), ()),
        (DESCRIPTION, ()),
        (AlignRequest(HEADER, 2, b"\x80"), ()),
        (AlignRequest(HEADER, 1, part="text", anchors="a1"), ()),
        (AlignReply("c", "t", TENSORS), ("fp32",)),
        (TrainRequest(HEADER, TENSORS, "d1", TENSORS, ["a"], ["b"]), ("fp32",)),
        (TrainRequest(HEADER, {}, "", None, [], channels={"a": SAID}), ("bf16",)),
        (TrainReply("c", "t", 5, "d1", TENSORS, {"loss": 1.5, "examples": 3.0}), ("fp32",)),
        (
            TrainReply("c", "t", 5, "", {}, {"loss": 1.5}, channels={"a": SAID, "b": Payload()}),
            ("bf16",),
        ),
        (EvaluateRequest(HEADER, TENSORS, "d1", None, ["global"]), ("fp32",)),
        (EvaluateReply("c", "t", 5, "d1", {"global_accuracy": 0.5}), ()),
    ],
)
def test_messages_survive_the_wire(message, arguments):
    content = message.to_content(*arguments)
    wired = RecordDict()
    for name, record in content.items():
        wired[name] = (
            record if isinstance(record, ArrayRecord) else type(record).inflate(record.deflate())
        )
    assert same(message, type(message).from_content(wired))


def test_errors_of_a_client_are_one_line_and_keep_their_kind():
    content = error_content("the disk\nis full\n")
    with pytest.raises(RemoteError, match=r"^the disk is full$") as caught:
        TrainReply.from_content(content)
    assert caught.value.kind == "failed"
    with pytest.raises(RemoteError) as caught:
        EvaluateReply.from_content(error_content("gone", ERROR_MAPS_MISSING))
    assert caught.value.kind == ERROR_MAPS_MISSING


def broken(content, record, key, value=None):
    changed = dict(content[record].items())
    if value is None:
        del changed[key]
    else:
        changed[key] = value
    content[record] = type(content[record])(changed)
    return content


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("client_id", None, "lacks the field 'client_id'"),
        ("hidden", "many", "'hidden' of the message is a str, expected int"),
        ("hidden", True, "expected int"),
        ("shapes", "{", "not JSON"),
        ("shapes", "[1]", "malformed"),
        ("labels", [1, 2], "list of texts"),
        ("vocabulary", "two words", "no id"),
        ("pieces", 1 << 40, "no client can have"),
    ],
)
def test_malformed_descriptions_name_the_field(key, value, message):
    content = broken(DESCRIPTION.to_content(), "config", key, value)
    with pytest.raises(ExchangeError, match=message):
        DescribeReply.from_content(content)


def test_other_malformed_messages_are_refused():
    with pytest.raises(ExchangeError, match="no 'config' record"):
        DescribeRequest.from_content(RecordDict())
    request = EvaluateRequest(HEADER, {}, "", None, ["secret"]).to_content("bf16")
    with pytest.raises(ExchangeError, match="global and personal"):
        EvaluateRequest.from_content(request)
    content = DescribeRequest(HEADER).to_content()
    with pytest.raises(ExchangeError, match="MethodConfig"):
        DescribeRequest.from_content(broken(content, "config", "method", '{"latent": 3}'))
    reply = TrainReply("c", "t", 1, "", {}, {"loss": 1.0}).to_content("bf16")
    reply["metrics"] = MetricRecord({"loss": [1.0, 2.0]})
    with pytest.raises(ExchangeError, match="is a list"):
        TrainReply.from_content(reply)
    del reply["metrics"]
    with pytest.raises(ExchangeError, match="no 'metrics' record"):
        TrainReply.from_content(reply)


def test_masks():
    mask = np.array([True, False, True] * 7)
    np.testing.assert_array_equal(unpack_mask(pack_mask(mask), 21), mask)
    with pytest.raises(ExchangeError, match="came as 3 bytes"):
        unpack_mask(pack_mask(mask), 30)


def test_output_width_is_given_or_labels_or_latent():
    by_label, by_words = AlignmentConfig(output="labels"), AlignmentConfig(output="vocabulary")
    method = MethodConfig(latent=8)
    assert resolve_output(method, by_label, ["a", "b", "c"]).output == 3
    assert resolve_output(method, by_label, None).output == 8
    assert resolve_output(method, by_words, ["a", "b", "c"]).output == 8
    assert resolve_output(MethodConfig(output=5), by_label, ["a"]).output == 5
