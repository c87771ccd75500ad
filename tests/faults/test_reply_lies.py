"""Lies in what a client says beside its update: names of metrics, results of tests, refusals, predictions, factors."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from fault_federation import answering, run, toy_spec
from test_factor_lies import HONEST, aligning, one

from heterotune_flwr.alignment.factor_checks import fault_of, same_backbone
from heterotune_flwr.channels.predictions.record import as_probabilities
from heterotune_flwr.errors import ConfigError, ExchangeError
from heterotune_flwr.exchange.spill import Spill, Stored
from heterotune_flwr.federation.admission import Admitted
from heterotune_flwr.federation.updates import RESERVED, ClientUpdate
from heterotune_flwr.flower import ConfigRecord, MetricRecord
from heterotune_flwr.protocol.wire import ERROR_REFUSED, error_content

LIAR = "client-0003"


def results(**values):
    def change(content):
        content["metrics"] = MetricRecord({**content["metrics"], **values})
        return content

    return change


def of_type(type_key, change):
    def changed(content):
        content["config"] = ConfigRecord({**content["config"], "type_key": type_key})
        return change(content)

    return changed


def play(prepare=None, clients=(2, 2, 2)):
    return run(toy_spec("heterotune"), clients, prepare=prepare, rounds=2, wait_seconds=0.1)


def test_metrics_may_have_any_name_even_where_everybody_uses_it():
    def named(federation, grid):
        federation.extra_metrics = dict.fromkeys([*RESERVED, "self", "path", "fields"], 7.0)

    ended = play(named)
    assert [event["round"] for event in ended.of("round")] == [1, 2]
    assert all(event["clients"] == 6 for event in ended.of("round"))
    assert ended.loss() == play().loss()


@pytest.mark.parametrize(
    "change",
    [
        results(personal_loss=float("nan")),
        results(personal_loss=1e300),
        results(personal_loss=-1.0),
        results(personal_accuracy=7.0),
        results(personal_rouge_l=float("inf")),
        results(personal_examples=float("nan")),
        results(global_loss=0.001, global_accuracy=1.0, global_examples=300.0),
        results(**{f"m{index}": 0.0 for index in range(100)}),
        of_type("large@fp32", results()),
    ],
)
def test_results_that_no_test_has_or_that_were_not_asked_for_are_refused(change):
    ended, honest = play(answering("evaluate", change, [LIAR])), play()
    assert {event["client_id"] for event in ended.of("refused")} == {LIAR}
    for row, other in zip(ended.strategy.outcome.rows, honest.strategy.outcome.rows, strict=True):
        if row.client_id == LIAR:  # of a type whose global test another was asked for
            assert row.personal_loss is None
            assert row.global_loss == other.global_loss
        else:
            assert row == other


def test_the_next_client_of_a_type_is_tested_where_the_first_one_lies():
    change = results(global_accuracy=2.0)
    ended = play(answering("evaluate", change, ["client-0000"]))
    assert ended.loss() == play().loss()


def test_a_nodes_refusal_is_no_failure():
    content = error_content("its budget is spent", ERROR_REFUSED)
    ended = play(answering("train", lambda _: content, [LIAR]))
    assert {event["client_id"] for event in ended.of("left_out")} == {LIAR}
    assert not ended.of("client_failed")


def test_predictions_of_any_size_are_probabilities_or_refused():
    large = as_probabilities(np.full((3, 4), 3e38, np.float32), 3, 4)
    np.testing.assert_allclose(large, 0.25)
    with pytest.raises(ExchangeError):
        as_probabilities(np.full((3, 4), np.inf, np.float32), 3, 4)
    with pytest.raises(ExchangeError):
        as_probabilities(np.zeros((3, 0), np.float32), 3)


def test_two_equal_rows_of_a_basis_are_no_backbone_and_no_error():
    def doubled(basis):
        return np.vstack([basis[:1], basis[:1], basis[2:]]) * np.float32(1e4)

    told = one("slots.0.basis", doubled)(HONEST)
    assert not fault_of(told, 1, None, 24, 6, False)
    assert not same_backbone(HONEST, told)
    assert not same_backbone(told, HONEST)
    assert play(aligning(one("slots.0.basis", doubled))).of("apart")


def test_factors_that_were_not_asked_for_are_refused():
    told = {**HONEST, "more": np.ones(3, np.float32)}
    assert "not asked for" in fault_of(told, 1, None, 24, 6, False)


def test_factors_of_symbols_are_of_all_of_them():
    told = {**HONEST, "label_rows": np.zeros((0, 24), np.float32)}
    parts = {"left": (9, 4), "singular": (4,), "right": (4, 24)}
    symbols = {f"symbols.{name}": np.ones(shape, np.float32) for name, shape in parts.items()}
    assert not fault_of({**told, **symbols}, 1, None, 24, 0, False, 9)
    assert "is missing" in fault_of(told, 1, None, 24, 0, False, 9)
    assert "not asked for" in fault_of({**told, **symbols}, 1, None, 24, 0, False)
    assert "impossible shape" in fault_of({**told, **symbols}, 1, None, 24, 0, False, 8)
    for name, value in symbols.items():
        for wrong in (value[:0], value.reshape(-1)[0], value[None]):
            assert "impossible shape" in fault_of(
                {**told, **symbols, name: wrong}, 1, None, 24, 0, False, 9
            )


def test_the_one_client_of_a_type_may_be_right_about_one_part_and_wrong_about_another():
    def half(factors):
        return {} if any(name.startswith("text") for name in factors) else factors

    ended = play(aligning(half), (1, 2, 2))
    assert [event["client_id"] for event in ended.of("left_out")] == ["client-0000"]
    assert ended.finite()


def test_a_shortened_update_stays_in_its_file(tmp_path):
    deltas = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float32)}
    stored = Spill(tmp_path).put(deltas, 1.0, "print")
    candidates = {
        name: SimpleNamespace(update=ClientUpdate(name, "t", 8, 2, 0.1, held))
        for name, held in {"stored": stored, "whole": deltas, "full": deltas}.items()
    }
    short, whole, full = Admitted(candidates, {"stored": 0.3, "whole": 0.3}).updates
    assert isinstance(short.deltas, Stored)
    assert full.deltas is deltas
    for name, value in deltas.items():
        np.testing.assert_array_equal(whole.deltas[name], np.float32(0.3) * value)
        np.testing.assert_array_equal(short.deltas[name], whole.deltas[name])


@pytest.mark.parametrize(
    ("name", "clients", "lie"),
    [
        ("heterofl", (6,), {"type_key": "evil@fp32", "fingerprint": "e" * 16}),
        ("fedrolex", (6,), {"type_key": "evil@bf16", "bits": "bf16"}),
        ("flora", (3, 2, 2), {"type_key": "evil@nf4", "bits": "nf4"}),
        ("fedex_lora", (3, 2, 2), {"type_key": "evil@nf4", "bits": "nf4"}),
    ],
)
def test_one_client_of_a_type_that_the_strategy_cannot_use_is_left_out(name, clients, lie):
    def described(content):
        content["config"] = ConfigRecord({**content["config"], **lie})
        return content

    ended = run(toy_spec(name), clients, prepare=answering("describe", described, [LIAR]), rounds=1)
    assert [event["client_id"] for event in ended.of("left_out")] == [LIAR]
    assert ended.finite()
    assert len(ended.strategy.outcome.rows) == sum(clients) - 1


@pytest.mark.parametrize("name", ["heterofl", "flora"])
def test_where_most_clients_are_of_such_types_the_settings_are_wrong(name):
    def quantize(content):
        content["config"] = ConfigRecord({**content["config"], "bits": "nf4"})
        return content

    everybody = [f"client-{index:04d}" for index in range(6)]
    with pytest.raises(ConfigError):
        run(toy_spec(name), (6,), prepare=answering("describe", quantize, everybody), rounds=1)


@pytest.mark.parametrize("name", ["heterofl", "fedrolex"])
def test_a_client_that_describes_itself_at_one_width_alone_ends_nothing(name):
    asked = []

    def once(content):
        asked.append(content)
        return content if len(asked) == 1 else error_content("no")

    ended = run(
        toy_spec(name),
        (6,),
        prepare=answering("describe", once, [LIAR]),
        rounds=2,
        wait_seconds=0.1,
    )
    assert len(asked) > 1
    assert ended.finite()
    assert len(ended.of("round")) == 2
