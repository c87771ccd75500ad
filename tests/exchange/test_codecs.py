"""int8, nf4 and topk against written-out oracles; sizes, fixed points, what is not finite; which way uses which."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from heterotune_flwr.config.compose import compose
from heterotune_flwr.config.shipped import conf_root
from heterotune_flwr.dema.bank import bank_shapes, initial_tensors
from heterotune_flwr.errors import ConfigError, ExchangeError
from heterotune_flwr.exchange.codecs import Codec, RecordCodec, find_codec, precise, topk_name
from heterotune_flwr.exchange.directions import down_codec, exact_codec, up_codec
from heterotune_flwr.exchange.manifest import Expected
from heterotune_flwr.exchange.packing import content_bytes, pack, payload_bytes, round_trip, unpack
from heterotune_flwr.protocol.messages import Header, TrainReply, TrainRequest
from heterotune_flwr.protocol.payloads import Payload
from heterotune_flwr.schema import ExchangeConfig, MethodConfig

LOSSY = ["int8", "nf4", "topk:0.1", "topk:0.5"]
arrays = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=70),
    elements=st.floats(width=32),
)
trees = st.dictionaries(st.sampled_from(["a", "b", "c.d"]), arrays, max_size=3)


def shapes_of(tensors):
    return {name: value.shape for name, value in tensors.items()}


@given(tensors=trees, codec=st.sampled_from(LOSSY))
@settings(max_examples=60, deadline=None)
def test_what_arrives_is_a_fixed_point_byte_for_byte(tensors, codec):
    record = pack(tensors, codec)
    seen = unpack(record, Expected(shapes_of(tensors)))
    again = pack(seen, codec)
    if codec in (
        "int8",
        "nf4",
    ):  # of topk the -0.0 and NaN of a hostile sender have several bit patterns
        assert again["data"].data == record["data"].data
    for name, value in unpack(again, Expected(shapes_of(tensors))).items():
        np.testing.assert_array_equal(value, seen[name])
        np.testing.assert_array_equal(value, round_trip(tensors, codec)[name])


@given(tensors=trees, codec=st.sampled_from(LOSSY))
@settings(max_examples=60, deadline=None)
def test_not_finite_arrives_as_not_finite_and_finite_as_finite(tensors, codec):
    seen = round_trip(tensors, codec)
    # topk rounds to bfloat16, where the largest float32 numbers are infinite
    limit = 3.38e38
    bad = any(not np.isfinite(value).all() for value in tensors.values())
    large = any((np.abs(value) > limit).any() for value in tensors.values())
    arrived_bad = any(not np.isfinite(value).all() for value in seen.values())
    assert arrived_bad == bad or (large and codec.startswith("topk"))


@given(
    values=hnp.arrays(
        np.float32,
        st.integers(1, 200),
        elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False),
    )
)
@settings(max_examples=60, deadline=None)
def test_blocks_err_by_at_most_half_a_step_of_their_own_scale(values):
    for codec, step in (("int8", 1 / 127), ("nf4", 0.3039)):
        seen = round_trip({"x": values}, codec)["x"]
        for start in range(0, len(values), 64):
            block = values[start : start + 64].astype(np.float64)
            peak = np.abs(block).max()
            limit = peak * (step / 2 + 2**-8) + 1.2e-38  # the scale is rounded, below it zeros
            assert np.abs(seen[start : start + 64] - block).max() <= limit


def test_nf4_agrees_with_the_quantiles_of_the_paper():
    """Block of 64 whose scale is exactly 1: every quantile arrives as itself, what lies between as the nearer one."""
    table = np.array([
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ])  # fmt: skip
    values = np.concatenate([table, np.random.default_rng(0).uniform(-1, 1, 48)]).astype(np.float32)
    seen = round_trip({"x": values}, "nf4")["x"]
    nearest = table[np.abs(values[:, None].astype(np.float64) - table).argmin(axis=1)]
    np.testing.assert_array_equal(seen, nearest.astype(np.float32))


def test_what_arrives_of_a_tensor_does_not_depend_on_its_neighbours():
    rng = np.random.default_rng(1)
    tensors = {f"t{i}": rng.normal(size=n) * 10.0**i for i, n in enumerate([3, 64, 65, 200])}
    for codec in ("int8", "nf4"):
        together = round_trip(tensors, codec)
        for name, value in tensors.items():
            np.testing.assert_array_equal(round_trip({name: value}, codec)[name], together[name])


@given(
    values=hnp.arrays(np.float32, st.integers(1, 300), elements=st.floats(-10, 10, width=16)),
    share=st.sampled_from([0.001, 0.05, 0.3, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_topk_keeps_the_largest_and_the_first_of_equals(values, share):
    codec = topk_name(share)
    seen = unpack(pack({"x": values}, codec), Expected({"x": values.shape}))["x"]
    rounded = round_trip({"x": values}, "bf16")["x"]
    count = math.ceil(round(share * 1e6) * len(values) / 1e6)
    order = np.lexsort((np.arange(len(values)), -np.abs(rounded)))[:count]
    oracle = np.zeros_like(values)
    oracle[order] = rounded[order]
    np.testing.assert_array_equal(seen, oracle)


def test_topk_chooses_over_the_whole_record():
    tensors = {"small": np.full(90, 0.01), "large": np.arange(1, 11)}
    seen = round_trip(tensors, "topk:0.1")
    assert not seen["small"].any()
    np.testing.assert_array_equal(seen["large"], tensors["large"])


def test_sizes_are_those_of_the_page():
    tensors = {"a": np.ones(100, np.float32), "b": np.ones(3, np.float32)}

    def data_bytes(codec):
        return len(pack(tensors, codec)["data"].data) - 128  # numpy's header

    assert data_bytes("int8") == 2 * (2 + 1) + 103
    assert data_bytes("nf4") == 2 * (2 + 1) + 52
    assert data_bytes("topk:0.1") == 11 * (2 + 2)
    wide = {"a": np.ones(1 << 17, np.float32)}
    assert len(pack(wide, "topk:0.001")["data"].data) - 128 == 132 * (4 + 2)


@pytest.mark.parametrize(
    "name", ["topk", "topk:", "topk:0.10", "topk:2", "topk:nan", "topk:1e-3", "topk:0.0001"]
)
def test_there_is_one_name_for_each_share(name):
    with pytest.raises(ExchangeError):
        find_codec(name)
    assert topk_name(0.25) == "topk:0.25"
    assert topk_name(1.0) == "topk:1"


# ------------------------------------------------------------------------------------ directions


def test_maps_keep_an_exact_codec_whatever_updates_use():
    def names(**fields):
        exchange = ExchangeConfig(**fields)
        return up_codec(exchange), down_codec(exchange), exact_codec(exchange)

    assert names() == ("bf16", "bf16", "bf16")
    assert names(codec="fp32", up="nf4") == ("nf4", "fp32", "fp32")
    assert names(codec="int8") == ("int8", "int8", "bf16")
    assert names(codec="fp16", up="topk", top_k=0.05, down="nf4") == ("topk:0.05", "nf4", "fp16")
    assert precise("topk:0.1") == "bf16"


def test_maps_of_a_request_and_what_a_channel_says_travel_by_their_own_codecs():
    tensors = {"a": np.random.default_rng(0).normal(size=200).astype(np.float32)}
    header = Header("e", 0, MethodConfig(output=4), 1)
    channels = {"control_variates": Payload(tensors)}
    request = TrainRequest(header, tensors, "d", tensors, ["a"], channels=channels)
    read = TrainRequest.from_content(request.to_content("nf4"))
    assert not np.allclose(read.tensors["a"], tensors["a"], rtol=1e-2)
    for exact in (read.maps, read.channels["control_variates"].tensors):
        np.testing.assert_array_equal(exact["a"], round_trip(tensors, "bf16")["a"])
    read = TrainRequest.from_content(request.to_content("nf4", "fp32"))
    np.testing.assert_array_equal(read.maps["a"], tensors["a"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("exchange.codec=topk", "updates alone: set exchange.up=topk"),
        ("exchange.down=topk", "exchange.down is 'topk'; choose from bf16"),
        ("exchange.up=topkk", "exchange.up is 'topkk'; choose from .*; did you mean 'topk'"),
        ("exchange.down=nf5", "exchange.down is 'nf5'; choose from .*; did you mean 'nf4'"),
        ("exchange.up=topk exchange.top_k=1.5", "exchange.top_k is 1.5"),
        ("exchange.top_k=0.0", "exchange.top_k is 0.0"),
        ("exchange.resend=never", "exchange.resend is 'never'"),
    ],
)
def test_wrong_settings_get_one_clear_line(words, message):
    with pytest.raises(ConfigError, match=message):
        compose("quick", words)


def bytes_of(exchange, output):
    """Content of one client-round with the default bank, down and up."""
    method = MethodConfig(output=output)
    values = initial_tensors(bank_shapes(method, output), 0)
    header = Header("run-heterotune-seed0", 0, method, 10)
    request = TrainRequest(header, values, 64 * "f", None, sorted(values))
    metrics = {f"a-metric-of-some-name-{i}": 1.0 for i in range(12)}
    digest = 64 * "f"
    reply = TrainReply("client-0001", "backbone@nf4", 10, digest, values, metrics, digest)
    up = reply.to_content(up_codec(exchange))
    return content_bytes(request.to_content(down_codec(exchange))), content_bytes(up)


@pytest.mark.parametrize("output", [16, 128])
def test_every_profile_keeps_its_promise_of_bytes(output):
    import yaml

    limits = {"bf16": 67_000, "int8": 36_000, "tiny": 18_000}
    for name, limit in limits.items():
        fields = yaml.safe_load((conf_root() / "exchange" / f"{name}.yaml").read_text())["exchange"]
        assert max(bytes_of(ExchangeConfig(**fields), output)) <= limit, name


# -------------------------------------------------------------------------------- codecs of one's own


def test_an_own_record_codec_is_held_to_its_length(monkeypatch):
    from heterotune_flwr.exchange import codecs

    def sign_codec(length):
        return RecordCodec(
            "|u1",
            length,
            lambda values, sizes: np.packbits(values >= 0),
            lambda data, sizes: (
                2.0 * np.unpackbits(data, count=sum(sizes)).astype(np.float32) - 1.0
            ),
        )

    monkeypatch.setitem(codecs.CODECS, "sign", sign_codec(lambda sizes: -(-sum(sizes) // 8)))
    values = np.array([-3.0, 2.0, 0.5], np.float32)
    np.testing.assert_array_equal(unpack(pack({"x": values}, "sign"))["x"], [-1, 1, 1])
    assert precise("sign") == "bf16"
    monkeypatch.setitem(codecs.CODECS, "sign", sign_codec(lambda sizes: 7))
    with pytest.raises(ExchangeError, match="the codec made uint8"):
        pack({"x": values}, "sign")
    assert precise("fp16") == "fp16"
    assert not Codec("<f4", lambda x: x, lambda x: x).lossy
    assert payload_bytes(pack({}, "int8")) > 0
