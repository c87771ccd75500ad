"""Robust means against naive loops, and against two of ten clients that turn their update round."""

from __future__ import annotations

import numpy as np
import pytest
from fault_federation import run, toy_spec
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from wire_faults import Fault, Hostile, each_value

from heterotune_flwr.cmga import Member, RobustMean, make_updates, within_type_mean
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.strategies.build import check_strategy

RULES = ["trimmed_mean", "median", "clipped_mean", "krum", "multi_krum"]


def naive(rule, rows, weights, trim, clip, hostile, keep):
    """The definitions, number by number."""
    n, width = len(rows), len(rows[0])
    everybody = range(n)

    def mean(chosen, scale=lambda i: 1.0):
        total = sum(weights[i] for i in chosen)
        return [
            sum(weights[i] * scale(i) * rows[i][d] for i in chosen) / total for d in range(width)
        ]

    if n <= 2:
        return mean(everybody)
    if rule == "median":
        columns = [sorted(row[d] for row in rows) for d in range(width)]
        return [(c[(n - 1) // 2] + c[n // 2]) / 2 for c in columns]
    if rule == "trimmed_mean":
        cut = int(trim * n + 1e-9)
        columns = [sorted(row[d] for row in rows)[cut : n - cut] for d in range(width)]
        return [sum(c) / len(c) for c in columns]
    if rule == "clipped_mean":
        lengths = [sum(x * x for x in row) ** 0.5 for row in rows]
        bound = clip * sorted(lengths)[(n - 1) // 2]
        return mean(everybody, lambda i: min(1.0, bound / lengths[i]) if lengths[i] else 1.0)
    scores = []
    for i in everybody:
        others = sorted(
            sum((a - b) ** 2 for a, b in zip(rows[i], rows[j], strict=True))
            for j in everybody
            if j != i
        )
        scores.append(sum(others[: max(1, n - hostile - 2)]))
    best = sorted(everybody, key=lambda i: scores[i])
    return mean(best[: 1 if rule == "krum" else keep or max(n - hostile, 1)])


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 2**20))
def test_every_rule_is_its_definition(rule, count, width, seed):
    # With one nearest neighbour to count, two that are each other's nearest tie: Krum may choose either.
    assume("krum" not in rule or not 2 < count < 5)
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(count, width)) * rng.uniform(0.1, 10, size=(count, 1))
    weights = rng.integers(1, 100, size=count).astype(float).tolist()
    options = {"trim": 0.25, "clip": 0.8, "hostile": 1, "keep": None}
    found = RobustMean(rule, **options)(list(rows), weights)
    np.testing.assert_allclose(found, naive(rule, rows.tolist(), weights, **options), atol=1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_two_of_ten_do_not_turn_the_direction(rule):
    rng = np.random.default_rng(3)
    truth = rng.normal(size=200)
    rows = [truth + 0.5 * rng.normal(size=200) for _ in range(10)]
    hostile = [-10 * row for row in rows[:2]] + rows[2:]
    mean = RobustMean(rule, hostile=2)(hostile, [48.0] * 10)
    cosine = mean @ truth / np.linalg.norm(mean) / np.linalg.norm(truth)
    plain = RobustMean()(hostile, [48.0] * 10)
    assert plain @ truth < 0
    assert cosine > 0.85, cosine


@pytest.mark.parametrize("rule", ["trimmed_mean", "median", "krum"])
def test_the_chain_averages_inside_types_by_the_rule(rule):
    rng = np.random.default_rng(1)
    members = [Member(f"c{i}", "ab"[i % 2], rng.normal(size=5), 1.0 + i) for i in range(9)]
    result, _ = within_type_mean(rule, hostile=1).update(make_updates(members), {})
    for key in "ab":
        group = [m for m in members if m.type_key == key]
        mean = RobustMean(rule)([m.vector for m in group], [m.examples for m in group])
        (found,) = [m for m in result.types if m.key == key]
        np.testing.assert_array_equal(found.vector, mean)


@pytest.mark.parametrize("name", ["heterotune", "within_type", "fedit"])
@pytest.mark.parametrize("rule", ["trimmed_mean", "median", "multi_krum"])
def test_one_line_keeps_two_of_ten_flips_out_where_the_gate_is_off(name, rule):
    """Ten clients of one type; the gate's size check is off, so that only the mean stands between."""
    flip = Hostile(("client-0000", "client-0001"), Fault(each_value(lambda value: -10 * value)))
    off = {"norm_limit": None, "norm_ceiling": None, "rounds": 4, "clients": (10,)}
    plain = run(toy_spec(name), prepare=flip, **off)
    robust = run({**toy_spec(name), "robust": {"rule": rule, "hostile": 2}}, prepare=flip, **off)
    alone = run(toy_spec(name), prepare=Hostile(flip.clients, None), **off)
    assert robust.loss() < 1.25 * alone.loss(), (robust.loss(), alone.loss())
    assert plain.loss() > 2 * alone.loss()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("medain", "strategies.x.robust.rule is 'medain'; choose from"),
        ({"rule": "median", "trum": 1}, "no key 'trum'"),
        ({"rule": "trimmed_mean", "trim": 0.5}, "trim is 0.5"),
        ({"rule": "krum", "hostile": 1.5}, "a whole number of at least 0 is needed"),
        (3, "write a rule's name"),
    ],
)
def test_wrong_rules_get_one_clear_line(tmp_path, entry, message):
    from toy_federation import toy_config

    config = toy_config(tmp_path, strategies={"x": {}})
    with pytest.raises(ConfigError, match=message):
        check_strategy("x", {**toy_spec("within_type"), "robust": entry}, config)


@pytest.mark.parametrize(("name", "who"), [("scaffold", "Scaffold"), ("flexlora", "FlexLoRA")])
def test_strategies_with_a_mean_of_their_own_say_so(tmp_path, name, who):
    from toy_federation import toy_config

    config = toy_config(tmp_path, strategies={"x": {}})
    with pytest.raises(ConfigError, match=f"{who} combines"):
        check_strategy("x", {**toy_spec(name), "robust": "median"}, config)
