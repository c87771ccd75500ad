"""docs/theory.md's numbered statements on latents, pooled statistics and the consensus, with the shipped code.

A test's number is its statement's. Data are synthetic, seeds are fixed.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from heterotune_flwr.alignment.gcca import fit_slot, held_out_quality
from heterotune_flwr.channels.predictions.server import confidence_weighted_mean
from heterotune_flwr.channels.predictions.token_record import TOP, TopSymbols
from heterotune_flwr.channels.statistics.class_pool import Classes
from heterotune_flwr.channels.statistics.server import linear_discriminant
from heterotune_flwr.exchange.codecs import UNIT8
from heterotune_flwr.exchange.packing import pack, round_trip

# ------------------------------------------------------------------------------------ what rho says


def test_5_rho_is_between_types_and_its_root_is_with_what_they_have_in_common():
    """Types see ``sqrt(rho) z + sqrt(1 - rho) e``, turned each its own way; the maps find the latents again."""
    rng = np.random.default_rng(0)
    rho, types, texts = np.array([0.9, 0.7, 0.5, 0.3]), 3, 20_000
    common = rng.normal(size=(texts, 4))
    scores = {}
    for name in range(types):
        turn, _ = np.linalg.qr(rng.normal(size=(4, 4)))
        seen = np.sqrt(rho) * common + np.sqrt(1 - rho) * rng.normal(size=(texts, 4))
        scores[f"t{name}"] = seen @ turn
    quality = held_out_quality(scores, 4, [1e-6])[1e-6]
    fitted = fit_slot(scores, 4, [1e-6])
    latents = np.stack([scores[key] @ fitted.coefficients[key] for key in scores])
    latents *= np.sign(np.mean(latents * common, axis=1))[:, None]  # the sign of a latent is free
    middle = latents.mean(axis=0)
    for key, seen in zip(scores, latents, strict=True):
        np.testing.assert_allclose(quality[key], rho, atol=0.03)
        np.testing.assert_allclose(np.mean(seen * common, axis=0), np.sqrt(rho), atol=0.03)
        error = np.sqrt(np.mean((seen - common) ** 2, axis=0))
        np.testing.assert_allclose(error, np.sqrt(2 - 2 * np.sqrt(rho)), atol=0.03)
        apart = np.mean((seen - middle) ** 2, axis=0)
        np.testing.assert_allclose(apart, (1 - rho) * (1 - 1 / types), atol=0.02)


# -------------------------------------------------------------------------------- pooled statistics


def classes_of(latents, labels, classes=3):
    counts = np.bincount(labels, minlength=classes).astype(float)
    return Classes(counts, np.stack([latents[labels == c].sum(axis=0) for c in range(classes)]))


def test_11_pooled_sums_do_not_depend_on_who_holds_which_example():
    rng = np.random.default_rng(1)
    latents, labels, metric = rng.normal(size=(90, 8)), rng.integers(0, 3, 90), rng.uniform(1, 2, 8)
    whole = classes_of(latents, labels)
    expected = linear_discriminant(whole.counts, whole.sums, metric, prior=2.0)
    for skew in (0.05, 0.3, 100.0):
        for _ in range(20):
            chances = rng.dirichlet([skew] * 5, size=3)  # of every class, over five clients
            owner = np.array([rng.choice(5, p=chances[label]) for label in labels])
            total = Classes(np.zeros(3), np.zeros((3, 8)))
            for client in range(5):
                total = total + classes_of(latents[owner == client], labels[owner == client])
            found = linear_discriminant(total.counts, total.sums, metric, prior=2.0)
            np.testing.assert_allclose(found.weight, expected.weight, atol=1e-5)
            np.testing.assert_allclose(found.bias, expected.bias, atol=1e-5)


def class_means(told, metric):
    """Where the shipped classifier has the classes, without shrinkage."""
    centre = told.sums.sum(axis=0) / told.counts.sum()
    return linear_discriminant(told.counts, told.sums, metric, prior=0.0).weight / metric + centre


def test_12_pooling_beats_own_data_where_bias_is_below_the_variance_it_saves():
    """Errors of class means in the metric, over many federations drawn anew, and whose are smaller."""
    rng = np.random.default_rng(2)
    width, counts, federations = 20, np.array([6, 10, 20, 60]), 400
    metric, spread = rng.uniform(0.5, 2.0, width), rng.uniform(0.7, 1.3, width)
    places = rng.normal(size=(3, width))
    offsets = 0.12 * np.arange(4)[:, None, None] * rng.normal(size=(4, 3, width))
    true = places + offsets
    own, pooled = np.zeros((4, 3)), np.zeros((4, 3))
    for _ in range(federations):
        told = []
        for where, count in zip(true, counts, strict=True):
            mine = np.repeat(np.arange(3), count)
            noise = spread * rng.normal(size=(len(mine), width))
            told.append(classes_of(where[mine] + noise, mine))
        total = told[0] + told[1] + told[2] + told[3]
        everybody = class_means(total, metric)
        for index, one in enumerate(told):
            own[index] += ((class_means(one, metric) - true[index]) ** 2) @ metric
            pooled[index] += ((everybody - true[index]) ** 2) @ metric
    own, pooled = own / federations, pooled / federations
    variance = float(metric @ spread**2)  # s^2 p
    middle = np.einsum("m,mcr->cr", counts / counts.sum(), true)
    bias = ((middle - true) ** 2) @ metric
    np.testing.assert_allclose(own, np.tile(variance / counts[:, None], 3), rtol=0.12)
    np.testing.assert_allclose(pooled, bias + variance / counts.sum(), rtol=0.12)
    saved = variance * (1 / counts - 1 / counts.sum())[:, None]
    clear = np.abs(bias / saved - 1) > 0.2
    np.testing.assert_array_equal((bias < saved)[clear], (pooled < own)[clear])
    assert (bias < saved)[clear].sum() >= 3
    assert (bias > saved)[clear].sum() >= 3


# ------------------------------------------------------------------------------------ the consensus


def drawn_predictions(rng, clients=7, labels=4, sharpness=3.0):
    logits = sharpness * rng.normal(size=(clients, 1, labels))
    return (np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("power", [0.0, 1.0, 4.0])
def test_13_the_consensus_loses_no_more_than_its_clients_and_nobody_alone_makes_it(power):
    rng = np.random.default_rng(3)
    gains, largest = [], 0.0
    for number in range(400):
        said = drawn_predictions(rng, sharpness=rng.choice([0.1, 3.0]))
        if number % 2:
            said[0] = np.eye(4)[0] * 0.9999 + 0.000025  # sure of itself, whatever the text
        right = rng.integers(0, 4)
        mean, weights = confidence_weighted_mean(said, [1 / 7] * 7, power)
        losses = -np.log(said[:, 0, right].astype(np.float64))
        gains.append(float(weights @ losses + np.log(mean[0, right])))
        largest = max(largest, *weights)
        others = np.delete(np.arange(7), 0)
        rest = np.array(weights)[others] @ said[others, 0] / np.sum(np.array(weights)[others])
        assert np.abs(mean[0] - rest).sum() / 2 <= weights[0] + 1e-6
    assert min(gains) >= -1e-6
    assert np.mean(gains) > 0.1
    assert largest <= 4 / (math.ceil(7 / 2) + 3)


def consensus_rounds(own, say, pull, rounds, of_last=1):
    """Means over clients of what they predict (texts x labels), round by round.

    Each replaces what it predicts by the best for ``say/2 |x - own|^2 + pull/2 |x - mean|^2``; the mean is that of so
    many last rounds.
    """
    clients = len(own)
    mean = np.full(own.shape[1:], 1 / own.shape[2])
    means = [mean]
    for _ in range(rounds):
        taught = np.mean(means[-of_last:], axis=0)
        fitted = (say[:, :, None] * own + pull * taught) / (say[:, :, None] + pull)
        mean, _ = confidence_weighted_mean(list(fitted), [1 / clients] * clients, 0.0)
        means.append(mean)
    return np.array(means)


def test_14_the_consensus_goes_to_what_those_say_who_have_examples_and_the_others_only_slow_it():
    rng = np.random.default_rng(4)
    clients, texts, pull = 5, 6, 1.0
    own = rng.dirichlet([1.0] * 3, size=(clients, texts))
    say = rng.uniform(0.2, 3.0, size=(clients, texts)) * (rng.random((clients, texts)) < 0.5)
    say[np.arange(texts) % clients, np.arange(texts)] = 1.0  # somebody knows something
    say[:, 0] = 0  # of the first text nobody knows anything
    say[:, 1] = [2, 0, 0, 0, 0]  # of the second one client does
    means = consensus_rounds(own, say, pull, 400)
    weight = say / (say + pull)
    np.testing.assert_allclose(means[:, 0], 1 / 3, atol=1e-6)
    np.testing.assert_allclose(means[-1, 1], own[0, 1], atol=1e-5)
    for text in range(1, texts):
        limit = weight[:, text] @ own[:, text] / weight[:, text].sum()
        np.testing.assert_allclose(means[-1, text], limit, atol=1e-5)
        left = np.linalg.norm(means[:12, text] - limit, axis=1)
        np.testing.assert_allclose(left[1:] / left[:-1], 1 - weight[:, text].mean(), atol=1e-3)
    slower = consensus_rounds(own, say, pull, 400, of_last=2)
    np.testing.assert_allclose(slower[-1], means[-1], atol=1e-5)
    assert (np.abs(slower[12] - slower[-1]) >= np.abs(means[12] - means[-1]) - 1e-9).all()


def test_14_a_strong_consensus_weighs_clients_by_their_examples_as_pooled_data_would():
    rng = np.random.default_rng(5)
    own, examples = rng.dirichlet([1.0] * 3, size=(4, 1)), np.array([[3.0], [10.0], [0.0], [40.0]])
    pooled = examples[:, 0] @ own[:, 0] / examples.sum()
    weak = consensus_rounds(own, examples, 0.01, 200)[-1, 0]
    strong = consensus_rounds(own, examples, 1000.0, 2000)[-1, 0]
    np.testing.assert_allclose(strong, pooled, atol=0.01)
    np.testing.assert_allclose(weak, own[[0, 1, 3], 0].mean(axis=0), atol=0.01)
    assert np.abs(weak - pooled).max() > 0.05


@pytest.mark.parametrize("knows_the_way", [True, False])
def test_15_whoever_hears_a_client_tells_no_more_secrets_apart_than_its_bytes_have_values(
    knows_the_way,
):
    """Two numbers a round on the shipped wire are 16 bits, a secret is 18: the best guess is right that often."""
    secrets = np.arange(2**18)
    heard = np.zeros((len(secrets), 0), np.uint8)
    rng = np.random.default_rng(6)
    for server_round in range(1, 4):
        if knows_the_way:  # the digits of the secret
            digits = (secrets >> (16 * (server_round - 1))) & 0xFFFF
            said = np.stack([digits & 0xFF, digits >> 8], axis=1) / 255
        else:  # full precision, another random code every round
            said = rng.random((len(secrets), 2))
        arrived = round_trip({"said": said}, UNIT8)["said"]
        heard = np.concatenate([heard, np.rint(255 * arrived).astype(np.uint8)], axis=1)
        words = np.zeros((len(secrets), 8), np.uint8)
        words[:, : heard.shape[1]] = heard
        # The best guess is right for one secret of those that sound alike.
        success = len(np.unique(words.view(np.uint64))) / len(secrets)
        bound = min(1.0, 2.0 ** (16 * server_round - 18))
        assert success <= bound
        assert success >= 0.9 * bound


def test_15_a_place_with_eight_symbols_is_24_bytes_beside_those_that_say_which():
    """Nothing else arrives of 500 places of 10 answers, and these bytes arrive as they were sent."""
    rng = np.random.default_rng(7)
    places, answers = np.arange(500), 10
    numbers = np.array([rng.choice(2**16, TOP, replace=False) for _ in places])
    chances = np.sort(rng.dirichlet([0.3] * TOP, size=len(places)))[:, ::-1]
    tensors = TopSymbols(
        places // 50, places % 50, np.ones_like(places), numbers, chances
    ).to_tensors(answers)
    arrived = round_trip(tensors, UNIT8)
    data = pack(tensors, UNIT8)["data"]
    assert data.dtype == "uint8"
    assert data.shape == ((24 + 3) * len(places) + answers,)
    assert tensors["top"].shape == (len(places), 24)
    heard = TopSymbols.from_tensors(arrived, answers, 2**16)
    np.testing.assert_array_equal(heard.numbers, numbers)
    np.testing.assert_array_equal(arrived["top"], tensors["top"])
