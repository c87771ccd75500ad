"""The fast laboratory: is the alignment right, before Flower is involved?

Two tables on frozen last-slot states (computed once per backbone, then kept in the cache):

* *read-out*: a linear classifier is trained on the latents of one model and tested on another's, against the
  number and kind of anchors; chance is 6 %.
* *federated*: clients with skewed data train the shared experts (Dirichlet 0.3, 96 examples each, 30 rounds of 12
  steps): alone, averaged inside each type, averaged across types; label-word and vocabulary outputs, and the
  controls in which the alignment is broken on purpose (their gain must vanish).

Run:  python -m benchmarks.alignment_probe --families real tiny --seeds 10
      (``heterotune fetch`` the real backbones first; a member that is not here is left out and named)
Cost: minutes per backbone once, for the states; then about 10 minutes per family on one CPU core.
Writes ``benchmarks/results/alignment_probe.json``. Settings come from the product's own configuration classes.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from benchmarks.common import write_results
from benchmarks.probe_clients import LatentTask, Schedule, draw_clients, latent_task
from benchmarks.probe_consensus import OPTIONS
from benchmarks.probe_federation import SHARINGS, federate
from benchmarks.probe_states import Task, TypeStates, load_task, load_type
from heterotune_flwr.alignment.factors import principal_components
from heterotune_flwr.alignment.maps import AlignmentResult, compute_maps
from heterotune_flwr.backbones.sources import EMBEDDED, is_present
from heterotune_flwr.schema import AlignmentConfig, DataConfig, MethodConfig

FAMILIES = {
    "real": ("smollm2", "gemma3-270m"),
    "real_three": ("smollm2", "gemma3-270m", "smollm2-pruned"),
    "real_mixed": ("smollm2@nf4", "gemma3-270m@int8", "smollm2-pruned"),
    "tiny": EMBEDDED,
    "tiny_five": (*EMBEDDED, "tiny-b@nf4", "tiny-c@int8"),
}


def present(family: str) -> list[str]:
    """Members of a family that are on this machine; the others are named."""
    here = [name for name in FAMILIES[family] if is_present(name.partition("@")[0])]
    if left_out := sorted(set(FAMILIES[family]) - set(here)):
        print(f"{family}: not on this machine, left out: {', '.join(left_out)}", flush=True)
    return here


CONTROLS = ("random_down", "random_up", "random_maps", "rotated_basis")
LABELLED = 600
#: Not those on which the settings were chosen (0 to 9).
FIRST_SEED = 100
#: Anchors a consensus may be about, in the end for guests.
POOL = OPTIONS.guest_anchors
#: The recommended choices, found with this laboratory; everything else is the product's default.
ALIGNMENT = AlignmentConfig(count=6000, weighting=2.0)
METHOD = MethodConfig(slots=1, latent=128, inner=32, experts_global=3, gate_scope="global")
SCHEDULE = Schedule(rounds=30, steps=12, rates=(2e-4, 4e-4, 7e-4, 1e-3, 2e-3, 4e-3, 8e-3))


class Laboratory:
    """States of a family's types and the maps computed from them."""

    def __init__(self, task: Task, types: list[TypeStates]) -> None:
        self.task = task
        self.types = types
        self.targets = (torch.from_numpy(task.pool_y), torch.from_numpy(task.test_y))
        self.index = {text: i for i, text in enumerate(task.pool)}
        self._components: dict[Any, Any] = {}

    def _word_factors(self, own: TypeStates, types: list[TypeStates], count: int) -> dict[str, Any]:
        shared = np.logical_and.reduce([t.words_mask for t in types])
        rows = own.word_rows[shared[own.words_mask]].astype(np.float64)
        left, singular, right = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
        return {
            "words.left": left[:, :count],
            "words.singular": singular[:count],
            "words.right": right[:count],
        }

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
            if alignment.output == "vocabulary":
                factors[own.name] |= self._word_factors(own, types, alignment.output_components)
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

    def federated(
        self, types: list[TypeStates], clients: int, seeds: list[int], alignment: AlignmentConfig,
        method: MethodConfig, schedule: Schedule, data: DataConfig,
    ) -> dict[str, Any]:  # fmt: skip
        """One row of the federated table: ``clients`` of each type, all sharings, paired over seeds."""
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


def read_out_row(
    lab: Laboratory,
    types: list[TypeStates],
    alignment: AlignmentConfig,
    method: MethodConfig,
    seeds: list[int],
) -> dict[str, Any]:
    """Within and across accuracy of a read-out, and what another model's labelled examples are worth."""
    result = lab.align(types, alignment, method)
    tasks = lab.latent_tasks(types, result)
    pool_y, test_y = lab.targets
    sums: dict[str, list[float]] = {
        k: [] for k in ("within", "across", "own_300", "own_600", "own_300_other_300")
    }

    def score(fitted: tuple[Tensor, Tensor], task: LatentTask) -> float:
        right = (task.test_z @ fitted[0] + fitted[1]).argmax(1) == test_y
        return 100 * float(right.double().mean())

    for seed, (a, b) in itertools.product(seeds, itertools.permutations(range(len(types)), 2)):
        order = torch.randperm(len(pool_y), generator=torch.Generator().manual_seed(seed))
        first, half, other = (
            order[:LABELLED],
            order[: LABELLED // 2],
            order[LABELLED // 2 : LABELLED],
        )
        fitted = read_out(tasks[a].pool_z[first], pool_y[first])
        sums["within"].append(score(fitted, tasks[a]))
        sums["across"].append(score(fitted, tasks[b]))
        sums["own_600"].append(sums["within"][-1])
        sums["own_300"].append(score(read_out(tasks[a].pool_z[half], pool_y[half]), tasks[a]))
        mixed = torch.cat([tasks[a].pool_z[half], tasks[b].pool_z[other]])
        both = read_out(mixed, torch.cat([pool_y[half], pool_y[other]]))
        sums["own_300_other_300"].append(score(both, tasks[a]))
    row: dict[str, Any] = {key: round(float(np.mean(value)), 1) for key, value in sums.items()}
    row["held_out_correlation"] = round(
        float(np.mean([quality[0] for quality in result.quality.values()])), 3
    )
    return row | {"shrinkage": result.shrinkage[0]}


def read_out_table(
    lab: Laboratory,
    pairs: list[list[TypeStates]],
    seeds: list[int],
    keep: Callable[[str, str, Any], None],
) -> None:
    """Read-out against the anchors' number and kind, for the first pair; every pair at the largest number."""
    for anchors, count in itertools.product(("debian-other", "wordnet"), (300, 1200, 4000, 6000)):
        alignment = replace(ALIGNMENT, anchors=anchors, count=count)
        row = read_out_row(lab, pairs[0], alignment, METHOD, seeds)
        keep("readout", f"{anchors}.{count}", row | {"seeds": seeds})
    for pair in pairs[1:]:
        name = "+".join(t.name for t in pair)
        keep("readout", name, read_out_row(lab, pair, ALIGNMENT, METHOD, seeds) | {"seeds": seeds})


#: As in ``conf/strategy/heterotune.yaml``.
TYPE_PHASE = {"type_phase": 0.5, "rule": "cmga", "mixing": 0.2}


def planned_rows(types: int) -> dict[str, tuple[int, int, dict[str, Any]]]:
    """Name -> (types, clients per type, what differs from the recommended settings)."""
    rows: dict[str, tuple[int, int, dict[str, Any]]] = {}
    vocabulary = {"alignment": {"output": "vocabulary", "output_components": 256}}
    for kinds, clients in itertools.product(sorted({2, types}), (1, 2, 4)):
        where = f"{kinds} types, {clients} per type"
        rows[f"{where}, labels"] = (kinds, clients, {})
        rows[f"{where}, labels, type phase"] = (kinds, clients, {"schedule": TYPE_PHASE})
        if clients < 4:
            rows[f"{where}, vocabulary"] = (kinds, clients, vocabulary)
    for clients in (1, 2):
        where = f"{types} types, {clients} per type"
        for control in CONTROLS:
            options: dict[str, Any] = {"alignment": {"control": control}}
            rows[f"{where}, control {control}"] = (types, clients, options)
            if clients == 1:
                options = {**options, "schedule": {"adjustment": 0.0}}
                rows[f"{where}, label prior not discounted, control {control}"] = (
                    types,
                    1,
                    options,
                )
        for name, options in ABLATIONS.items():
            rows[f"{where}, {name}"] = (types, clients, options)
    return rows


def federated_table(
    lab: Laboratory, seeds: list[int], only: list[str], keep: Callable[[str, str, Any], None]
) -> None:
    """The planned rows whose name contains one of ``only``."""
    for name, (kinds, clients, options) in planned_rows(len(lab.types)).items():
        if not any(part in name for part in only):
            continue
        row = lab.federated(
            lab.types[:kinds], clients, seeds,
            replace(ALIGNMENT, **options.get("alignment", {})),
            replace(METHOD, **options.get("method", {})),
            replace(SCHEDULE, **options.get("schedule", {})),
            replace(lab.task.data, **options.get("data", {})),
        )  # fmt: skip
        keep("federated", name, row | {"seeds": seeds})


#: What each choice is worth: one at a time, against the defaults.
ABLATIONS: dict[str, dict[str, Any]] = {
    "gate averaged inside a type": {"schedule": {"gate_scope": "type"}},
    "norm-equalised mean": {"schedule": {"rule": "equalised"}},
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


def run_family(
    task: Task, names: list[str], seeds: list[int], tables: list[str], only: str,
    keep: Callable[[str, str, Any], None],
) -> list[str]:  # fmt: skip
    """All tables of one family; every finished row goes to ``keep(table, name, row)``."""
    lab = Laboratory(task, [load_type(name, task) for name in names])
    pairs = [list(pair) for pair in itertools.combinations(lab.types, 2)]
    if "readout" in tables:
        read_out_table(lab, pairs, seeds[:3], keep)
    if "federated" in tables:
        federated_table(lab, seeds, only, keep)
    return [t.name for t in lab.types]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--families", nargs="+", choices=sorted(FAMILIES), default=["real", "real_three", "tiny"]
    )
    parser.add_argument("--tables", nargs="+", choices=["readout", "federated"],
                        default=["readout", "federated"])  # fmt: skip
    parser.add_argument("--seeds", type=int, default=6, help="number of seeds")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="federated rows whose name contains one of these"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = list(range(FIRST_SEED, FIRST_SEED + args.seeds))
    task = load_task()
    values: dict[str, Any] = {}
    for family in args.families:
        here = present(family)
        left_out = sorted(set(FAMILIES[family]) - set(here))
        if len(here) < 2:
            continue
        settings = {
            "alignment": asdict(ALIGNMENT),
            "method": asdict(METHOD),
            "train": asdict(SCHEDULE),
        }
        values[family] = entry = {"types": here, "left_out": left_out, "settings": settings}

        def keep(table: str, name: str, row: Any, entry: dict[str, Any] = entry) -> None:
            entry.setdefault(table, {})[name] = row
            write_results("alignment_probe", values)  # at once: nothing computed is lost
            print(
                table,
                name,
                {k: v for k, v in row.items() if k not in ("types", "by_rate")},
                flush=True,
            )

        run_family(task, here, seeds, args.tables, args.only, keep)


if __name__ == "__main__":
    main()
