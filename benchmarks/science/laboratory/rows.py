"""A family's states and maps, and rows of tables made of them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from benchmarks import runner
from benchmarks.science.laboratory.clients import LatentTask, Schedule, draw_clients, latent_task
from benchmarks.science.laboratory.consensus import OPTIONS
from benchmarks.science.laboratory.federation import SHARINGS, federate
from benchmarks.science.laboratory.states import Task, TypeStates, load_task, load_type
from heterotune_flwr.alignment.factors import principal_components
from heterotune_flwr.alignment.maps import AlignmentResult, compute_maps
from heterotune_flwr.alignment.public_texts import SHIPPED
from heterotune_flwr.backbones.sources import EMBEDDED, is_present
from heterotune_flwr.schema import AlignmentConfig, DataConfig, MethodConfig

FAMILIES = {
    "real_mixed": ("smollm2@nf4", "gemma3-270m@int8", "smollm2-pruned"),
    "tiny": EMBEDDED,
    "tiny_five": (*EMBEDDED, "tiny-b@nf4", "tiny-c@int8"),
}
#: Not those on which the settings were chosen (0 to 9).
FIRST_SEED = 100
#: Anchors a consensus may be about, in the end for guests.
POOL = OPTIONS.guest_anchors
#: The recommended choices, found with this laboratory; everything else is the product's default.
ALIGNMENT = AlignmentConfig(count=6000, weighting=2.0)
METHOD = MethodConfig(slots=1, latent=128, inner=32, experts_global=3, gate_scope="global")
SCHEDULE = Schedule(rounds=30, steps=12, rates=(2e-4, 4e-4, 7e-4, 1e-3, 2e-3, 4e-3, 8e-3))
#: As in ``conf/strategy/heterotune.yaml``.
TYPE_PHASE: dict[str, Any] = {"personalization_phase": 0.5, "rule": "cmga"}


def arguments(doc: str | None, families: Sequence[str], seeds: int = 6) -> argparse.ArgumentParser:
    """A command's parser: of which families, with how many seeds."""
    parser = runner.arguments(doc)
    parser.add_argument("--families", nargs="+", choices=sorted(FAMILIES), default=list(families))
    parser.add_argument("--seeds", type=int, default=seeds, help="number of seeds")
    return parser


def seeds_of(args: argparse.Namespace) -> list[int]:
    """The seeds of a command; torch takes one thread, as the tables' numbers were made."""
    torch.set_num_threads(1)
    return list(range(FIRST_SEED, FIRST_SEED + args.seeds))


def laboratories(
    families: Sequence[str], anchors: Sequence[str] = SHIPPED, least: int = 2
) -> Iterator[tuple[str, Laboratory]]:
    """Families of which enough members are on this machine; who is not is named."""
    task = load_task()
    for family in families:
        here = [name for name in FAMILIES[family] if is_present(name.partition("@")[0])]
        if left_out := sorted(set(FAMILIES[family]) - set(here)):
            runner.say(f"{family}: not on this machine, left out: {', '.join(left_out)}")
        if len(here) >= least:
            yield family, Laboratory(task, here, [load_type(name, task, anchors) for name in here])


class Laboratory:
    """States of a family's types and the maps computed from them."""

    def __init__(self, task: Task, names: Sequence[str], types: list[TypeStates]) -> None:
        self.task = task
        self.names = list(names)
        self.types = types
        self.targets = (torch.from_numpy(task.pool_y), torch.from_numpy(task.test_y))
        self.index = {text: i for i, text in enumerate(task.pool)}
        self._components: dict[Any, Any] = {}

    def align(
        self,
        types: list[TypeStates],
        alignment: AlignmentConfig,
        method: MethodConfig,
        seed: int = 0,
    ) -> AlignmentResult:
        """The product's maps for some types."""
        factors: dict[str, dict[str, Any]] = {}
        for own in types:
            key = (own.name, alignment.anchors, alignment.count, alignment.components)
            if key not in self._components:
                anchors = own.anchors[alignment.anchors][: alignment.count]
                self._components[key] = principal_components(anchors, alignment.components)
            parts = zip(("scores", "basis", "mean"), self._components[key], strict=True)
            factors[own.name] = {f"slots.0.{name}": value for name, value in parts}
            factors[own.name]["label_rows"] = own.label_rows
        return compute_maps(factors, alignment, method, self.task.labels, seed)

    def latent_tasks(
        self, types: list[TypeStates], result: AlignmentResult, anchors: str = ALIGNMENT.anchors
    ) -> list[LatentTask]:
        """The task as seen through the maps, and what a consensus is about."""
        return [
            latent_task(
                result.maps[t.name], t.label_rows, t.pool, t.test, t.anchors[anchors][:POOL]
            )
            for t in types
        ]

    def row(
        self, types: list[TypeStates], clients: int, seeds: list[int], **changed: dict[str, Any]
    ) -> dict[str, Any]:
        """One row: ``clients`` of each type, all sharings, paired over seeds.

        ``changed``: fields of ``alignment``, ``method``, ``schedule`` and ``data`` that are not as recommended.
        """
        alignment = replace(ALIGNMENT, **changed.get("alignment", {}))
        method = replace(METHOD, **changed.get("method", {}))
        schedule = replace(SCHEDULE, **changed.get("schedule", {}))
        data: DataConfig = replace(self.task.data, **changed.get("data", {}))
        total = clients * len(types)
        shares = draw_clients(data, total, seeds, self.index)
        # A single client of its type has nobody to average with: alone and within are the same.
        sharings = SHARINGS if clients > 1 else SHARINGS[1:]
        if alignment.control == "none":
            tasks = self.latent_tasks(types, self.align(types, alignment, method))
            found = federate(tasks, self.targets, shares, total, seeds, method, schedule, sharings)
        else:  # a broken alignment is drawn anew for every seed
            parts = []
            for i, seed in enumerate(seeds):
                tasks = self.latent_tasks(types, self.align(types, alignment, method, seed))
                own = shares[i * total : (i + 1) * total]
                parts.append(
                    federate(tasks, self.targets, own, total, [seed], method, schedule, sharings)
                )
            found = {key: np.concatenate([part[key] for part in parts], axis=1) for key in parts[0]}
        found.setdefault("alone", found["within"])
        return table_row(found, [t.name for t in types], schedule.rates)


def tuned(accuracies: NDArray[np.float64]) -> NDArray[np.float64]:
    """From rates x seeds x clients to seeds x clients: each seed at the rate that is best on the others.

    A learning rate that suits shared training overfits a client alone, and the other way round; so every
    sharing gets its own, and never one chosen on the seed it is measured on.
    """
    if accuracies.shape[1] == 1:
        raise ValueError("choosing the learning rate on other seeds needs at least two seeds")
    means = accuracies.mean(axis=2)
    best = [
        int(np.delete(means, seed, axis=1).mean(axis=1).argmax()) for seed in range(means.shape[1])
    ]
    return np.stack([accuracies[rate, seed] for seed, rate in enumerate(best)])


def table_row(
    found: dict[str, NDArray[np.float64]], names: list[str], rates: tuple[float, ...]
) -> dict[str, Any]:
    """Means over seeds and clients with every sharing at its own best learning rate, and by rate.

    Gains are paired, with their standard error over seeds. ``gain_at_one_rate`` compares sharings at the
    rate that is best for sharing across types: it flatters sharing, and is here to show by how much.
    """
    best = {key: tuned(value) for key, value in found.items()}
    row: dict[str, Any] = {key: round(float(value.mean()), 2) for key, value in best.items()}
    for rival in ("within", "alone"):
        gains = (best["across"] - best[rival]).mean(axis=1)
        row[f"gain_over_{rival}"] = round(float(gains.mean()), 2)
        row[f"gain_over_{rival}_se"] = round(float(gains.std(ddof=1) / len(gains) ** 0.5), 2)
    same = int(found["across"].mean(axis=(1, 2)).argmax())
    row["gain_at_one_rate"] = round(float((found["across"] - found["within"])[same].mean()), 2)
    row["clients_helped"] = round(float((best["across"] > best["within"]).mean()), 3)
    row["by_rate"] = {
        key: {str(rate): round(float(v.mean()), 2) for rate, v in zip(rates, value, strict=True)}
        for key, value in found.items()
    }
    row["types"] = {
        name: {
            key: round(float(value[:, i :: len(names)].mean()), 2) for key, value in best.items()
        }
        for i, name in enumerate(names)
    }
    return row


def read_out(train_z: Tensor, train_y: Tensor, penalty: float = 1e-2) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression (r x C weights, C biases)."""
    classes = int(train_y.max()) + 1
    weights = torch.zeros(train_z.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=60)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(train_z @ weights + bias, train_y)
        loss = loss + penalty * weights.pow(2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weights.detach(), bias.detach()


CONTROLS = ("random_down", "random_up", "random_maps", "rotated_basis")
#: What each choice is worth: one at a time, against the defaults.
ABLATIONS: dict[str, dict[str, Any]] = {
    "gate averaged inside a type": {"schedule": {"gate_scope": "type"}},
    "label words moved each alone": {"alignment": {"label_geometry": False}},
    "latents weighed equally": {"alignment": {"weighting": 0.0}},
    "latents weighed by correlation": {"alignment": {"weighting": 1.0}},
    "r=64": {"method": {"latent": 64}},
    "r=256 from 512 components": {"method": {"latent": 256}, "alignment": {"components": 512}},
    "one wide expert": {"method": {"experts_global": 1, "inner": 96}},
    "1200 anchors": {"alignment": {"count": 1200}},
    "wordnet anchors": {"alignment": {"anchors": "wordnet"}},
    "label prior not discounted": {"schedule": {"adjustment": 0.0}},
    "almost no skew": {"data": {"alpha": 5.0}},
}
