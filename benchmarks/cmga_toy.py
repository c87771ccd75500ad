"""What each step of CMGA is for, on toy updates without any model (docs/method.md, section 4).

Every scene has a hidden direction per type (what its data really ask for) that the types' updates
show through noise. A rule is judged by the cosine between its step and the hidden directions: the
worst type's, and the mean. Step lengths do not enter.

Run:  python -m benchmarks.cmga_toy        (a few seconds on one core)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from heterotune_flwr.cmga import Member, build_chain, make_updates
from heterotune_flwr.exchange.storage import atomic_write_text

Vector = np.ndarray[Any, np.dtype[np.float64]]
DIMENSION, ROUNDS, CLIENTS = 400, 12, 4

WITHIN = {"transform": "within_type_mean"}
EQUALISE = {"transform": "equalise_norms"}
RELIABILITY = {"transform": "weigh_reliability"}
DECONFLICT = {"transform": "deconflict"}
UNGUARDED = {"transform": "combine", "guard": False}
RULES: dict[str, Sequence[Mapping[str, Any]]] = {
    "mean": [WITHIN, {"transform": "combine", "weights": "examples", "guard": False}],
    "deconflict only": [WITHIN, DECONFLICT, UNGUARDED],
    "equalise": [WITHIN, EQUALISE, UNGUARDED],
    "equalise + reliability": [WITHIN, EQUALISE, RELIABILITY, UNGUARDED],
    "equalise + reliability + deconflict": [WITHIN, EQUALISE, RELIABILITY, DECONFLICT, UNGUARDED],
    "CMGA (with guard)": [WITHIN, EQUALISE, RELIABILITY, DECONFLICT, {"transform": "combine"}],
}


def unit(vector: Vector) -> Vector:
    return vector / np.linalg.norm(vector)


def related(rng: np.random.Generator, count: int, cosine: float) -> list[Vector]:
    """``count`` unit directions with the given expected cosine between any two (may be < 0)."""
    target = np.full((count, count), cosine) + (1 - cosine) * np.eye(count)
    basis = np.linalg.qr(rng.normal(size=(DIMENSION, count)))[0]
    return list((basis @ np.linalg.cholesky(target).T).T)


class Scene:
    """Hidden directions, scales and noise of the types; ``judged`` are those with a signal."""

    def __init__(
        self, hidden: list[Vector], scales: list[float], noise: list[float], signal: list[bool]
    ) -> None:
        self.hidden, self.scales, self.noise, self.signal = hidden, scales, noise, signal

    def clients(self, rng: np.random.Generator) -> list[Member]:
        """Draw one round's pseudo-gradients of all clients."""
        members = []
        for index, direction in enumerate(self.hidden):
            for client in range(CLIENTS):
                noise = self.noise[index] * unit(rng.normal(size=DIMENSION))
                vector = self.scales[index] * (self.signal[index] * direction + noise)
                members.append(Member(f"client-{index}-{client}", f"type-{index}", vector, 1.0))
        return members


def loud(rng: np.random.Generator) -> Scene:
    """Three types that half agree; one is ten times louder."""
    return Scene(related(rng, 3, 0.2), [10.0, 1.0, 1.0], [1.0] * 3, [True] * 3)


def noisy(rng: np.random.Generator) -> Scene:
    """Four types, one of which sends nothing but noise, as loud as the others."""
    return Scene(related(rng, 4, 0.3), [1.0] * 4, [1.5] * 3 + [2.5], [True] * 3 + [False])


def conflict(rng: np.random.Generator) -> Scene:
    """Five types in strong conflict (pairwise cosine -0.2) at unequal scales."""
    return Scene(related(rng, 5, -0.2), [5.0, 1.0, 1.0, 1.0, 0.5], [0.5] * 5, [True] * 5)


def minority(rng: np.random.Generator) -> Scene:
    """Four types that agree (cosine 0.5) and a fifth at cosine -0.4 to each of them."""
    target = np.full((5, 5), 0.5) + 0.5 * np.eye(5)
    target[4, :4] = target[:4, 4] = -0.4
    basis = np.linalg.qr(rng.normal(size=(DIMENSION, 5)))[0]
    hidden = list((basis @ np.linalg.cholesky(target).T).T)
    return Scene(hidden, [1.0] * 5, [0.7] * 5, [True] * 5)


def peaceful(rng: np.random.Generator) -> Scene:
    """Three types that agree, at one scale: here CMGA must cost nothing."""
    return Scene(related(rng, 3, 0.6), [1.0] * 3, [1.0] * 3, [True] * 3)


SCENES: dict[str, Callable[[np.random.Generator], Scene]] = {
    "one type 10x louder": loud,
    "one noise-only type of four": noisy,
    "five types in conflict": conflict,
    "four types against one": minority,
    "three types that agree": peaceful,
}


def judge(rule: Sequence[Mapping[str, Any]], make: Callable[..., Scene], seed: int) -> list[float]:
    """Worst and mean cosine to the hidden directions over the last rounds of one scene."""
    rng = np.random.default_rng(seed)
    scene = make(rng)
    chain = build_chain(rule)
    state = chain.init()
    worst, mean = [], []
    for round in range(1, ROUNDS + 1):
        state, result = chain.update(state, make_updates(scene.clients(rng), round, seed))
        step = unit(result.direction)
        pairs = zip(scene.hidden, scene.signal, strict=True)
        values = [float(step @ unit(direction)) for direction, signal in pairs if signal]
        if round > ROUNDS // 2:
            worst.append(min(values))
            mean.append(float(np.mean(values)))
    return [float(np.mean(worst)), float(np.mean(mean))]


def main(seeds: int = 10) -> dict[str, Any]:
    results: dict[str, Any] = {
        "command": "python -m benchmarks.cmga_toy",
        "seeds": seeds,
        "dimension": DIMENSION,
        "clients_per_type": CLIENTS,
        "scenes": {},
    }
    for scene, make in SCENES.items():
        table = {}
        for name, rule in RULES.items():
            scores = np.array([judge(rule, make, seed) for seed in range(seeds)])
            table[name] = {
                "worst_type_cosine": round(float(scores[:, 0].mean()), 4),
                "worst_type_cosine_std": round(float(scores[:, 0].std(ddof=1)), 4),
                "mean_cosine": round(float(scores[:, 1].mean()), 4),
            }
        results["scenes"][scene] = table
    return results


if __name__ == "__main__":
    outcome = main()
    path = Path(__file__).parent / "results" / "cmga_toy.json"
    atomic_write_text(path, json.dumps(outcome, indent=2) + "\n")
    for scene, table in outcome["scenes"].items():
        sys.stdout.write(f"\n{scene}\n")
        for name, row in table.items():
            worst, mean = row["worst_type_cosine"], row["mean_cosine"]
            sys.stdout.write(f"  {name:38s} worst {worst:+.3f}  mean {mean:+.3f}\n")
