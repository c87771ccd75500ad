"""What clients took home, as a run's results tell it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from heterotune_flwr.protocol.metrics import FEDERATED, MEASURED, MODELS, TESTS, metric_of


@dataclass(frozen=True)
class Kept:
    """One client's choice.

    Attributes
    ----------
    took
        ``bare``, ``alone`` or ``federated``.
    tests
        Model -> ``{personal,global}_{accuracy,loss,...}`` of the tests it answered; no ``alone`` where it trained none.
    choosing
        ``examples``, and model -> mean loss on them and standard error of its difference from the bare model's; of the
        federated one ``own_rounds``, where it had such.

    """

    took: str
    tests: Mapping[str, Mapping[str, float]]
    choosing: Mapping[str, Any]

    @classmethod
    def of(cls, took: str, metrics: Mapping[str, float]) -> Kept | None:
        """Read it out of a client's metrics; None where it told of no choice.

        What it measured of the federated model as the strategy has it gives way to what it could take home.
        """
        if not took:
            return None
        tests: dict[str, dict[str, float]] = {}
        choosing: dict[str, Any] = {"examples": int(metrics.get("choosing_examples", 0))}
        for name in sorted(metrics, key=lambda name: name.startswith(f"{FEDERATED}_")):
            (model, scope, measure), value = metric_of(name), metrics[name]
            if scope in TESTS and measure in MEASURED:
                tests.setdefault(model, {})[f"{scope}_{measure}"] = value
            elif scope == "choosing" and measure != "examples":
                choosing.setdefault(model, {})[measure] = value
        return cls(took, tests, choosing)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Kept:
        """Read what :meth:`to_json` gave (KeyError, TypeError: it is none)."""
        tests = {name: entry[name] for name in MODELS if entry[name]}
        return cls(str(entry["took"]), tests, entry["choosing"])

    def to_json(self) -> dict[str, Any]:
        """Return ``kept`` of a client in results.json; ``taken`` are the tests of what it took."""
        tests = {name: dict(self.tests.get(name, {})) for name in (*MODELS, self.took)}
        return {
            "took": self.took,
            **{name: tests[name] for name in MODELS},
            "taken": tests[self.took],
            "choosing": dict(self.choosing),
        }


def summary(kept: Iterable[Kept | None]) -> dict[str, Any]:
    """How many took what, and means on own tests over those that have all models (``{}`` where nobody chose).

    ``own_tests``: ``bare``, ``alone`` (where trained), ``federated`` and ``taken`` -> measure -> mean.
    """
    told = [each for each in kept if each is not None]
    if not told:
        return {}
    models = [name for name in MODELS if any(each.tests.get(name) for each in told)]
    models = models or [FEDERATED]
    own: dict[str, dict[str, float]] = {name: {} for name in (*models, "taken")}
    for measure in MEASURED:
        name = f"personal_{measure}"
        have = [
            k for k in told if all(name in k.tests.get(model, {}) for model in (*models, k.took))
        ]
        if have:
            for model in models:
                own[model][measure] = float(np.mean([k.tests[model][name] for k in have]))
            own["taken"][measure] = float(np.mean([k.tests[k.took][name] for k in have]))
    counts = Counter(each.took for each in told)
    return {
        "clients": len(told),
        "took": {name: counts[name] for name in MODELS},
        "own_tests": own,
    }
