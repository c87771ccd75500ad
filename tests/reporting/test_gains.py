"""Gains are paired by seed and client, and the table also says what sharing costs on own data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from heterotune_flwr.reporting.measures import paired_gain, subject_of
from heterotune_flwr.reporting.tables import final_table


def run(
    strategy: str, seed: int, clients: dict[str, float], personal: float | None = None
) -> dict[str, Any]:
    rows = [
        {
            "client_id": name,
            "type": name[0],
            "global_accuracy": value,
            "personal_accuracy": personal,
        }
        for name, value in clients.items()
    ]
    counts = {
        "up_per_client_round": 1.0, "down_per_client_round": 1.0, "one_time_up": 0, "one_time_down": 0,
        "lora16_bytes": 10.0, "model_bytes": 100.0,
    }  # fmt: skip
    return {"strategy": strategy, "seed": seed, "clients": rows, "bytes": counts}


def test_gains_pair_the_same_client_of_the_same_seed() -> None:
    results = {
        "runs": [
            run("within_type", 0, {"a1": 0.2, "b1": 0.4, "b2": 0.9}),
            run("within_type", 1, {"a1": 0.5, "b1": 0.5}),
            run("within_type", 2, {"a1": 0.9, "b1": 0.9}),
            # b2 was not measured in seed 0, and seed 2 is not done: neither may count.
            run("heterotune", 0, {"a1": 0.3, "b1": 0.5}),
            run("heterotune", 1, {"a1": 0.8, "b1": 0.5}),
        ]
    }
    gain = paired_gain(results, "heterotune", "within_type")
    assert gain is not None
    assert gain[0] == pytest.approx((10.0 + 15.0) / 2)
    assert gain[1] == pytest.approx(5 / 2**0.5)
    only_a = paired_gain(results, "heterotune", "within_type", "a")
    assert only_a is not None
    assert only_a[0] == pytest.approx((10.0 + 30.0) / 2)
    assert paired_gain(results, "heterotune", "fedit") is None


def test_gains_are_heterotunes_in_whatever_order_strategies_ran() -> None:
    assert subject_of(["heterotune", "local_only"]) == "heterotune"
    assert subject_of(["local_only", "mean"]) == "mean"
    results = {"runs": [run("heterotune", 0, {"a1": 0.5}), run("local_only", 0, {"a1": 0.2})]}
    text = final_table(results, Path("/runs/x"))
    assert "gain over local only" in text
    assert "+30.0" in text


def test_a_loss_on_own_tests_is_shown_beside_the_gain() -> None:
    results = {
        "runs": [
            run("local_only", 0, {"a1": 0.2}, personal=0.6),
            run("heterotune", 0, {"a1": 0.5}, personal=0.4),
        ]
    }
    table = final_table(results, Path("/runs/x"))
    (row,) = [line for line in table.splitlines() if "on own tests" in line]
    assert row.split()[-3:] == ["60.0", "40.0", "-20.0"]
    assert "1 seed: small differences are noise" in table


def test_names_and_numbers_fit_a_narrow_terminal_uncut() -> None:
    names = {"gemma3-270m": 0.4, "smollm2": 0.5}
    results = {
        "runs": [
            run(
                strategy, seed, {f"{name}@int8": value + seed / 10 for name, value in names.items()}
            )
            for strategy in ("local_only", "within_type", "heterotune")
            for seed in (0, 1)
        ]
    }
    text = final_table(results, Path("/runs/x"), width=80)
    assert "…" not in text
    assert "45.0 ± 7.1" in text
    assert "+0.0 ± 0.0" in text


def test_many_strategies_have_a_row_each_and_nothing_is_cut() -> None:
    names = ["local_only", "within_type", "fedit", "fed_sb", "flower_krum", "hetlora", "mine"]
    types = {f"backbone-{n}@int8": n / 10 for n in range(7)}
    results = {
        "runs": [
            run(name, seed, {key: value + place / 100 for key, value in types.items()}, 0.5)
            for place, name in enumerate(names)
            for seed in (0, 1)
        ]
    }
    for one in results["runs"]:
        for client in one["clients"]:
            client["type"] = client["client_id"]
    table = final_table(results, Path("/runs/x"))
    assert "…" not in table
    first, *_ = table.split("Accuracy (%) on the clients' own tests")
    rows = {line.split()[0]: line for line in first.splitlines() if "±" in line}
    assert rows["hetlora"].split()[-3:] == ["+1.0", "±", "0.0"]
    assert rows["mine"].split()[-3:] == ["50.0", "±", "0.0"]  # its own tests; no gain over itself
    assert "gains: mine over the others" in table
