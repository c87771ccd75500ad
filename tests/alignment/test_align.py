"""The alignment: GCCA against an oracle, planted latents, output maps by effect, controls, late joiners."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heterotune_flwr.alignment.functionals import label_functionals
from heterotune_flwr.alignment.gcca import (
    fit_slot,
    held_out_quality,
    latent_weights,
    ridge,
    shared_latents,
    unit_variance,
)
from heterotune_flwr.alignment.maps import compute_maps, join_type
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.schema import AlignmentConfig, MethodConfig

SEEDS = st.integers(0, 10_000)
LABELS = ["a", "b", "c", "d"]
WIDTHS = {"one": 20, "two": 28, "three": 24}
WORDS, RANK, ANCHORS = 60, 6, 500


def orthogonal(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((size, size)))[0]


def correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.array([np.corrcoef(a[:, j], b[:, j])[0, 1] for j in range(a.shape[1])])


class World:
    """Types whose states are different noisy linear views of one planted latent (n x RANK)."""

    def __init__(self, seed: int, noise: float = 0.2, shared: bool = True) -> None:
        self.rng = np.random.default_rng(seed)
        self.planted = self.rng.standard_normal((ANCHORS, RANK))
        self.states: dict[str, np.ndarray] = {}
        self.heads: dict[str, np.ndarray] = {}
        meaning = self.rng.standard_normal((WORDS, RANK))
        for name, width in WIDTHS.items():
            own = self.planted if shared else self.rng.standard_normal((ANCHORS, RANK))
            mix = self.rng.standard_normal((RANK, width))
            self.states[name] = (
                own @ mix + noise * self.rng.standard_normal((ANCHORS, width))
            ) * self.rng.uniform(0.1, 30) + self.rng.standard_normal(width)
            self.heads[name] = meaning @ self.rng.standard_normal((RANK, width))
            self.heads[name] += 0.1 * self.rng.standard_normal((WORDS, width))

    def factors(self, *names: str) -> dict[str, dict[str, np.ndarray]]:
        return {name: self._factors(name) for name in names or WIDTHS}

    def _factors(self, name: str) -> dict[str, np.ndarray]:
        states, head = self.states[name], self.heads[name]
        mean = states.mean(0)
        left, singular, right = np.linalg.svd(states - mean, full_matrices=False)
        hl, hs, hr = np.linalg.svd(head - head.mean(0), full_matrices=False)
        return {
            "slots.0.scores": left * singular, "slots.0.basis": right, "slots.0.mean": mean,
            "label_rows": head[: len(LABELS)],
            "symbols.left": hl, "symbols.singular": hs, "symbols.right": hr,
        }  # fmt: skip

    def latents(self, maps: dict[str, np.ndarray], name: str) -> np.ndarray:
        return self.states[name] @ maps["slots.0.map.down.weight"].T + maps["slots.0.map.down.bias"]


def align(world: World, *names: str, **options: object):
    alignment = AlignmentConfig(**{"weighting": 0.0, **options})  # type: ignore[arg-type]
    return compute_maps(
        world.factors(*names), alignment, MethodConfig(latent=RANK, slots=1), LABELS
    )


# --- GCCA ---------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.sampled_from([0.001, 0.1, 1.0]))
def test_latents_are_the_leading_eigenvectors_of_the_summed_ridge_projections(seed, shrinkage):
    rng = np.random.default_rng(seed)
    scores = {k: rng.standard_normal((40, p)) * 3 + 1 for k, p in {"a": 5, "b": 7, "c": 6}.items()}
    total = np.zeros((40, 40))
    for value in scores.values():
        centred = value - value.mean(0)
        k = shrinkage * np.mean(np.sum(centred**2, axis=0))
        total += (
            centred @ np.linalg.inv(centred.T @ centred + k * np.eye(value.shape[1])) @ centred.T
        )
    latents = shared_latents(scores, 4, shrinkage)
    np.testing.assert_allclose(latents.T @ latents / 40, np.eye(4), atol=1e-8)
    captured = np.trace(latents.T @ total @ latents) / 40
    assert captured == pytest.approx(np.linalg.eigvalsh(total)[-4:].sum(), rel=1e-8)


@settings(max_examples=15, deadline=None)
@given(SEEDS)
def test_a_planted_latent_is_found_by_every_type(seed):
    world = World(seed)
    result = align(world)
    reached = {name: world.latents(result.maps[name], name) for name in WIDTHS}
    assert correlations(reached["one"], reached["two"]).min() > 0.9
    assert correlations(reached["one"], reached["three"]).min() > 0.9
    # The latents span the planted ones, up to a rotation that is the same for all.
    fitted = reached["two"] @ np.linalg.lstsq(reached["one"], world.planted, rcond=None)[0]
    assert correlations(fitted, world.planted).min() > 0.9
    assert min(quality[0] for quality in result.quality.values()) > 0.85


@settings(max_examples=15, deadline=None)
@given(SEEDS)
def test_types_that_share_nothing_have_no_quality(seed):
    result = align(World(seed, shared=False))
    assert max(quality[0] for quality in result.quality.values()) < 0.35


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.floats(0.01, 100))
def test_a_types_own_rotation_and_scale_do_not_matter(seed, scale):
    world = World(seed)
    before = align(world)
    turned = World(seed)
    turned.states["two"] = scale * turned.states["two"] @ orthogonal(world.rng, WIDTHS["two"])
    after = align(turned)
    for name in WIDTHS:
        a, b = world.latents(before.maps[name], name), turned.latents(after.maps[name], name)
        np.testing.assert_allclose(np.abs(correlations(a, b)), 1.0, atol=1e-4)
    assert after.quality["two"] == pytest.approx(before.quality["two"], abs=1e-3)


def test_the_order_of_types_does_not_matter():
    world = World(3)
    forward, backward = align(world, "one", "two"), align(world, "two", "one")
    for name, value in forward.maps["two"].items():
        np.testing.assert_array_equal(value, backward.maps["two"][name])


def test_ridge_is_least_squares_with_penalty_rows():
    rng = np.random.default_rng(0)
    scores, latents = rng.standard_normal((50, 6)), rng.standard_normal((50, 3))
    centred = scores - scores.mean(0)
    k = 0.3 * np.mean(np.sum(centred**2, axis=0))
    augmented = np.concatenate([centred, np.sqrt(k) * np.eye(6)])
    wanted = np.concatenate([latents, np.zeros((6, 3))])
    expected = np.linalg.lstsq(augmented, wanted, rcond=None)[0]
    np.testing.assert_allclose(ridge(scores, latents, 0.3), expected, atol=1e-8)


def test_shrinkage_is_the_best_on_held_out_anchors():
    world = World(1, noise=3.0)
    scores = {name: own["slots.0.scores"][:60] for name, own in world.factors().items()}
    candidates = [1e-4, 1e-2, 1.0, 10.0]
    qualities = {k: np.mean([v.mean() for v in found.values()])
                 for k, found in held_out_quality(scores, RANK, candidates).items()}  # fmt: skip
    fit = fit_slot(scores, RANK, candidates)
    assert qualities[fit.shrinkage] == max(qualities.values())
    assert qualities[fit.shrinkage] > qualities[1e-4]
    assert np.mean(list(fit.quality.values())) == pytest.approx(qualities[fit.shrinkage])


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=8), st.floats(0, 3))
def test_weights_have_mean_square_one_and_follow_the_correlations(rho, exponent):
    weights = latent_weights({"a": np.array(rho), "b": np.array(rho)}, exponent)
    assert np.mean(weights**2) == pytest.approx(1.0)
    order = np.argsort(rho)
    assert np.all(np.diff(weights[order]) >= -1e-12)


def test_latents_have_mean_zero_and_the_weights_as_spread():
    world = World(5)
    for exponent in (0.0, 1.0):
        result = align(world, weighting=exponent)
        for name in WIDTHS:
            reached = world.latents(result.maps[name], name)
            np.testing.assert_allclose(reached.mean(0), 0, atol=1e-3)
            np.testing.assert_allclose(
                reached.std(0), result.anchor_latents["slots.0.weights"], rtol=1e-3
            )


def test_unit_variance_leaves_an_empty_direction_finite():
    scores = np.random.default_rng(0).standard_normal((20, 3))
    coefficients = np.array([[1.0, 0], [2, 0], [3, 0]])
    assert np.isfinite(unit_variance(scores, coefficients)).all()


def test_a_single_type_aligns_with_itself():
    result = align(World(0), "one")
    assert result.quality == {"one": [1.0]}


# --- Output maps ----------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(SEEDS)
def test_label_outputs_move_the_label_words_equally_in_every_type(seed):
    world = World(seed)
    result = align(world, output="labels")
    assert result.output_width == len(LABELS)
    wanted = result.anchor_latents["label_functionals"]
    for name in WIDTHS:
        effect = world.heads[name][: len(LABELS)] @ result.maps[name]["slots.0.map.up.weight"]
        np.testing.assert_allclose(effect, wanted, atol=1e-3)


def test_label_functionals_are_the_common_geometry_of_the_label_words():
    rows = np.array([[1.0, 0.1, 0.0], [1.0, 0.0, 0.1], [-1.0, 0.0, 0.0]]) + 5.0
    turned = 7.0 * rows @ np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
    found = label_functionals({"a": {"label_rows": rows}, "b": {"label_rows": turned}})
    centred = rows - rows.mean(0)
    gram = centred @ centred.T
    np.testing.assert_allclose(found @ found, gram * 3 / np.trace(gram), atol=1e-9)
    assert found[0, 1] > 0.2 > 0 > found[0, 2]  # near words move together
    np.testing.assert_allclose(found.sum(0), 0, atol=1e-6)
    np.testing.assert_array_equal(label_functionals({"a": {"label_rows": rows}}, False), np.eye(3))


@settings(max_examples=10, deadline=None)
@given(SEEDS)
def test_vocabulary_outputs_have_the_same_effect_in_every_type(seed):
    world = World(seed)
    result = align(world, output="vocabulary")
    effects = {}
    for name in WIDTHS:
        centred = world.heads[name] - world.heads[name].mean(0)
        effects[name] = centred @ result.maps[name]["slots.0.map.up.weight"]
    sizes = [np.linalg.norm(effect) for effect in effects.values()]
    np.testing.assert_allclose(sizes, sizes[0], rtol=1e-3)
    assert np.abs(correlations(effects["one"], effects["two"])).min() > 0.9
    assert correlations(effects["one"], effects["three"]).min() > 0.9


def test_deeper_slots_invert_the_pulled_back_functionals():
    world = World(2)
    factors = world.factors()
    for name, own in factors.items():
        for key in ("scores", "basis", "mean"):
            own[f"slots.1.{key}"] = own[f"slots.0.{key}"]
        own["slots.0.pullback"] = world.rng.standard_normal((len(LABELS), WIDTHS[name]))
    method = MethodConfig(latent=RANK, slots=2)
    result = compute_maps(factors, AlignmentConfig(), method, LABELS)
    wanted = result.anchor_latents["label_functionals"]
    for name, own in factors.items():
        effect = own["slots.0.pullback"] @ result.maps[name]["slots.0.map.up.weight"]
        np.testing.assert_allclose(effect, wanted, atol=0.1)
        last = own["label_rows"] @ result.maps[name]["slots.1.map.up.weight"]
        np.testing.assert_allclose(last, wanted, atol=1e-3)
    assert [len(quality) for quality in result.quality.values()] == [2, 2, 2]


# --- Controls -------------------------------------------------------------------------------------


def test_random_input_maps_share_nothing_but_have_the_same_scale():
    world = World(4)
    broken = align(world, control="random_down")
    reached = {name: world.latents(broken.maps[name], name) for name in WIDTHS}
    assert np.abs(correlations(reached["one"], reached["two"])).mean() < 0.6
    intact = align(world)
    was = world.latents(intact.maps["one"], "one").std(0)
    np.testing.assert_allclose(reached["one"].std(0), was, rtol=0.05)
    for name in WIDTHS:
        key = "slots.0.map.up.weight"
        np.testing.assert_array_equal(broken.maps[name][key], intact.maps[name][key])


def test_random_output_maps_have_the_size_but_not_the_effect():
    world = World(4)
    intact, broken = align(world), align(world, control="random_up")
    for name in WIDTHS:
        up, was = (r.maps[name]["slots.0.map.up.weight"] for r in (broken, intact))
        assert np.linalg.norm(up) == pytest.approx(np.linalg.norm(was), rel=1e-4)
        effect = world.heads[name][: len(LABELS)] @ up
        assert np.linalg.norm(effect - intact.anchor_latents["label_functionals"]) > 0.5
        down = "slots.0.map.down.weight"
        np.testing.assert_array_equal(broken.maps[name][down], intact.maps[name][down])


def test_a_rotated_basis_changes_one_type_only_and_keeps_its_geometry():
    world = World(4)
    intact, broken = align(world), align(world, control="rotated_basis")
    victim = sorted(WIDTHS)[-1]
    for name in WIDTHS:
        same = np.array_equal(
            broken.maps[name]["slots.0.map.down.weight"],
            intact.maps[name]["slots.0.map.down.weight"],
        )
        assert same == (name != victim)
    before, after = (world.latents(r.maps[victim], victim) for r in (intact, broken))
    np.testing.assert_allclose(before @ before.T, after @ after.T, atol=1e-2)
    other = next(name for name in WIDTHS if name != victim)
    assert np.abs(correlations(after, world.latents(broken.maps[other], other))).mean() < 0.7


def test_controls_are_reproducible_and_differ_between_seeds():
    factors = World(4).factors()
    method = MethodConfig(latent=RANK)

    def draw(seed: int) -> np.ndarray:
        config = AlignmentConfig(control="random_maps")
        return compute_maps(factors, config, method, LABELS, seed).maps["one"][
            "slots.0.map.down.weight"
        ]

    np.testing.assert_array_equal(draw(1), draw(1))
    assert not np.allclose(draw(1), draw(2))


# --- A type that comes later ----------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(SEEDS, st.sampled_from(["labels", "vocabulary"]))
def test_a_late_type_reaches_the_known_latents_without_changing_them(seed, output):
    world = World(seed)
    known = align(world, "one", "two", output=output)
    maps, quality = join_type(known, world.factors("three")["three"], MethodConfig(latent=RANK))
    reached = world.latents(maps, "three")
    assert correlations(reached, world.latents(known.maps["one"], "one")).min() > 0.85
    assert quality[0] > 0.85
    assert set(maps) == set(known.maps["one"])


def test_a_late_type_must_have_seen_the_same_anchors():
    world = World(0)
    own = world.factors("three")["three"]
    own["slots.0.scores"] = own["slots.0.scores"][:-1]
    with pytest.raises(ConfigError, match=r"499 anchors.*500"):
        join_type(align(world, "one", "two"), own, MethodConfig(latent=RANK))


# --- What users get wrong -------------------------------------------------------------------------


def test_too_wide_a_latent_says_what_to_change():
    factors = World(0).factors("one")
    with pytest.raises(ConfigError, match=r"method\.latent is 99.*components"):
        compute_maps(factors, AlignmentConfig(), MethodConfig(latent=99), LABELS)


def test_different_numbers_of_anchors_are_refused():
    factors = World(0).factors("one", "two")
    factors["two"]["slots.0.scores"] = factors["two"]["slots.0.scores"][:-3]
    with pytest.raises(ConfigError, match="different numbers of anchors"):
        compute_maps(factors, AlignmentConfig(), MethodConfig(latent=RANK), LABELS)


def test_label_outputs_need_labels_and_their_width():
    factors = World(0).factors("one")
    with pytest.raises(ConfigError, match="no closed label set"):
        compute_maps(factors, AlignmentConfig(), MethodConfig(latent=RANK), None)
    with pytest.raises(ConfigError, match=r"method\.output is 7"):
        compute_maps(factors, AlignmentConfig(), MethodConfig(latent=RANK, output=7), LABELS)
