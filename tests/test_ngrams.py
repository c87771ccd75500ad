"""A text's character n-grams behind a public projection, as one more view of the shared discriminant."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_client import folder, world  # noqa: F401  (fixtures)
from test_consensus import DEEP, FEW
from test_discriminant_client import adapted  # noqa: F401  (fixture)
from test_lora_variants import run
from test_tuning import data, directory  # noqa: F401  (fixtures)

from heterotune_flwr.alignment.public_texts import load_anchors
from heterotune_flwr.channels.statistics.client import class_sums, shared_latents
from heterotune_flwr.client.handlers import Client
from heterotune_flwr.client.identity import identify
from heterotune_flwr.config.compose import compose
from heterotune_flwr.dema.ngrams import NgramView, ngrams
from heterotune_flwr.errors import ConfigError, ExchangeError
from heterotune_flwr.preflight import preflight
from heterotune_flwr.schema import AlignmentConfig, MethodConfig
from heterotune_flwr.tuning.task import EncodedSet

HETEROTUNE = "heterotune_flwr.strategies.heterotune.HeteroTune"


@pytest.fixture(scope="module")
def anchors():
    return load_anchors(AlignmentConfig(count=120))


def test_ngrams_are_of_letters_and_digits_with_the_ends_of_words():
    assert ngrams("A b!") == {" a ": 1, "a b": 1, " b ": 1, " a b": 1, "a b ": 1, " a b ": 1}
    assert ngrams("aaaa")["aaa"] == 2
    assert ngrams("") == ngrams("?!") == {}
    assert ngrams("Größe-Я")["röß"] == ngrams("Größe-Я")["e я"] == 1


def test_the_anchors_have_variance_one_and_no_axis_repeats_another(anchors):
    view = NgramView.of(anchors, 8)
    z = view.of_texts(anchors).astype(float)
    np.testing.assert_allclose(z.std(axis=0), 1, rtol=1e-4)
    weighed = view.weighed(anchors).toarray()
    np.testing.assert_allclose(np.linalg.norm(weighed, axis=1), 1, rtol=1e-9)
    _, _, right = np.linalg.svd(weighed)
    unit = view.axes / np.linalg.norm(view.axes, axis=1, keepdims=True)
    cosines = np.sort(np.abs(np.sum(unit * right[:8][::-1], axis=1)))
    assert cosines[0] > 0.999  # the leading ones, svds' order being the other way round
    assert not view.of_texts([" ", "qzx"]).any()


def test_equal_anchors_give_equal_axes_in_whatever_process(anchors):
    one, two = NgramView.of(anchors, 5), NgramView.of(list(anchors), 5)
    np.testing.assert_array_equal(one.axes, two.axes)
    assert (np.take_along_axis(one.axes, np.abs(one.axes).argmax(axis=1)[:, None], 1) > 0).all()


def test_more_axes_than_the_anchors_have_are_refused(anchors):
    with pytest.raises(ConfigError, match=r"method\.ngrams is 10, but .* 10 anchors have 9 axes"):
        NgramView.of(anchors[:10], 10)
    repeated = [anchors[0], anchors[1], anchors[2]] * 20
    with pytest.raises(ConfigError, match=r"60 anchors have 3 axes.*more different"):
        NgramView.of(repeated, 8)
    with pytest.raises(ConfigError, match="have 0 axes"):
        NgramView.of(["?!", "..."] * 20, 2)


def test_they_come_after_the_models_own_views(adapted, anchors):  # noqa: F811
    adapter, task, encoded = adapted
    assert len(encoded.texts) == len(encoded)
    alone = shared_latents(adapter, encoded).numpy()
    adapter.method, adapter.anchors = replace(adapter.method, ngrams=6), tuple(anchors)
    both = shared_latents(adapter, encoded).numpy()
    np.testing.assert_array_equal(both[:, :-6], alone)
    np.testing.assert_array_equal(both[:, -6:], NgramView.of(anchors, 6).of_texts(encoded.texts))
    with pytest.raises(ExchangeError, match="n-grams of these examples"):
        shared_latents(adapter, EncodedSet(encoded.inputs, encoded.positions, encoded.targets))
    told = class_sums(adapter, task, encoded, 1)
    np.testing.assert_allclose(told.sums.sum(axis=0), both.sum(axis=0), rtol=1e-4, atol=1e-4)


def test_a_run_pools_them_over_all_types(world, folder, tmp_path):  # noqa: F811
    # Of the task's own words: those of the world's anchors are others.
    public = tmp_path / "public.jsonl"
    public.write_text("".join((folder / "train.jsonl").read_text().splitlines(keepends=True)[:40]))
    words = f"{FEW} strategies.{DEEP}.method.ngrams=5 alignment.anchors={public}"
    strategy = run(world, DEEP, rounds=2, overrides=words)
    shared = strategy.discriminant
    assert len(shared.spreads) == 2 * strategy.method.latent + 5
    for type_key in strategy.roster.type_keys:
        weight = shared.of(type_key).weight
        assert weight.shape == (3, len(shared.spreads))
        assert np.abs(weight[:, -5:]).max() > 0


def test_without_a_discriminant_nobody_reads_them(world):  # noqa: F811
    strategy = run(
        world, DEEP, rounds=1,
        overrides=f"{FEW} strategies.{DEEP}.method.ngrams=5 strategies.{DEEP}.statistics=null",
    )  # fmt: skip
    assert strategy.method.ngrams == 0


def test_no_node_computes_what_nothing_reads(world, monkeypatch):  # noqa: F811
    def never(anchors, width):
        raise AssertionError("n-grams are read")

    monkeypatch.setattr(NgramView, "of", never)
    options = f"strategies.{DEEP}.method.ngrams=5 strategies.{DEEP}.statistics=null"
    run(world, DEEP, rounds=1, overrides=f"{FEW} {options}")


def test_more_than_the_anchors_can_have_is_refused_before_any_work(world):  # noqa: F811
    config = compose(str(world.path / "run.yaml"), f"run.compare=[{DEEP}]")
    config.strategies = {DEEP: {"_component_": HETEROTUNE, "method": {"ngrams": 40}}}
    with pytest.raises(ConfigError, match=r"ngrams is 40, more than 40 anchors can have"):
        preflight(config)


def test_a_deployed_node_reads_none(world):  # noqa: F811
    config = compose(str(world.path / "run.yaml"))
    node = {"client-id": "n", "backbone": "tiny-a", "data": "d.jsonl", "state-dir": str(world.path)}
    client = Client(identify(config, node), config, None)
    with pytest.raises(ConfigError, match="for simulations"):
        client._anchors(MethodConfig(ngrams=5))
    assert client._anchors(MethodConfig()) == ()
