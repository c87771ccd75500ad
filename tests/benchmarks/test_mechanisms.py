"""What is left out of HeteroTune, and what a cost is."""

from __future__ import annotations

import pytest

from benchmarks.science import mechanisms
from benchmarks.science.mechanism_rows import FULL, ROWS
from heterotune_flwr.config.compose import compose
from heterotune_flwr.strategies.build import check_strategy


@pytest.mark.parametrize("name", ROWS)
def test_every_row_differs_from_the_preset_and_can_run(name):
    row = ROWS[name]
    entry = mechanisms.entry_of("sections", row, 0.001)
    config = compose("demo", row.overrides)
    check_strategy("one", entry, config)
    assert (name == FULL) == (
        entry == mechanisms.entry_of("sections", ROWS[FULL], 0.001) and config == compose("demo")
    )


class _Cells:
    def __init__(self, values):
        self.values = values

    def read(self):
        return {
            f"{task}|test|{name}|{seed}": {
                "clients": [{f"global_{what}": v, f"personal_{what}": v}]
            }
            for (task, what, name), own in self.values.items()
            for seed, v in enumerate(own)
        }


def test_a_cost_is_points_lost_or_nats_gained_and_what_is_added_is_the_other_way_round(monkeypatch):
    accuracy, loss = ("sections", "accuracy"), ("instructions", "loss")
    values = {
        (*accuracy, FULL): [0.6, 0.7], (*accuracy, "balance"): [0.5, 0.64],
        (*loss, FULL): [2.0, 2.1], (*loss, "predictions"): [2.2, 2.3], (*loss, "annealing"): [2.1, 2.2],
        (*loss, "slow_gate"): [2.0],
    }  # fmt: skip
    monkeypatch.setattr(mechanisms, "_CELLS", _Cells(values))
    found = mechanisms.costs("sections", [0, 1]) | mechanisms.costs("instructions", [0, 1])
    assert found["sections.full.level"] == pytest.approx(35)
    assert found["sections.balance.cost"] == pytest.approx(8)
    assert found["sections.balance.cost_low"] < 8 < found["sections.balance.cost_high"]
    assert found["instructions.predictions.cost"] == pytest.approx(0.2)
    assert found["instructions.annealing.own_cost"] == pytest.approx(-0.1)
    assert not any("slow_gate" in key for key in found)
