"""What the shared discriminant knows: classes pooled over model types in closed form, against training on all latents.

In the laboratory (:mod:`.alignment_probe`: frozen last-slot states, the product's alignment, partition and closed
form). Accuracy on the global test in percent, mean over types and seeds, with 1, 2, 4 and 16 clients per type:

* ``pooled``: the discriminant of all clients' class sums, each told behind its own type's maps; ``own_type``: of those
  of one's own type alone;
* ``trained``: logistic regression on everybody's latents at once, which no federation could do (the penalty of three
  that does best on these very tests); ``moved``: the same with everybody's *texts* read by one's own model;
* what its options do: ``least`` (examples of a class below which a client tells nothing), ``prior``, and the power of
  each latent's correlation in the metric (1 in the product).

Run: ``python -m benchmarks.discriminant`` (minutes per backbone once, for the states; then minutes).
Writes ``benchmarks/results/discriminant.json``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.alignment_probe import ALIGNMENT, FAMILIES, METHOD, Laboratory, present, read_out
from benchmarks.common import write_results
from benchmarks.probe_clients import LatentTask, draw_clients
from benchmarks.probe_states import load_task, load_type
from heterotune_flwr.config.schema import DataConfig
from heterotune_flwr.strategies.discriminant import DiscriminantOptions, linear_discriminant

CLIENTS = (1, 2, 4, 16)
#: Neither the headline's nor those of its sweeps.
SEEDS = tuple(range(30, 36))
OPTIONS = DiscriminantOptions()
_PENALTIES = (1e-2, 3e-2, 1e-1)
Fitted = tuple[Tensor, Tensor]


class Classes:
    """The clients of one draw, and what can be made of their classes."""

    def __init__(self, lab: Laboratory, tasks: list[LatentTask], clients: int, seed: int) -> None:
        self.tasks, self.labels, self.test_y = tasks, *lab.targets
        self.count = int(self.labels.max()) + 1
        shares = draw_clients(DataConfig(), clients * len(tasks), [seed], lab.index)
        # The product's order: types in turn.
        self.owned = [(number % len(tasks), share) for number, share in enumerate(shares)]

    def accuracy(self, fitted: Callable[[int], Fitted]) -> float:
        """Mean over types of what is fitted for each, in percent."""
        found = []
        for number, task in enumerate(self.tasks):
            weight, bias = fitted(number)
            right = (task.test_z @ weight + bias).argmax(1) == self.test_y
            found.append(100 * float(right.double().mean()))
        return float(np.mean(found))

    def pooled(
        self, metric: np.ndarray[Any, Any], least: int, prior: float, kinds: Sequence[int]
    ) -> Fitted:
        """The discriminant of the classes of some types' clients."""
        counts = np.zeros(self.count)
        sums = np.zeros((self.count, len(metric)))
        for kind, share in self.owned:
            if kind not in kinds:
                continue
            labels = self.labels[share]
            own = torch.bincount(labels, minlength=self.count).numpy()
            z = self.tasks[kind].pool_z[share].double()
            total = torch.zeros(sums.shape, dtype=torch.double).index_add_(0, labels, z).numpy()
            told = own >= least
            counts, sums = counts + own * told, sums + total * told[:, None]
        found = linear_discriminant(counts, sums, metric, prior)
        return torch.from_numpy(found.weight).T, torch.from_numpy(found.bias)

    def trained(self, kind: int | None) -> list[Fitted]:
        """Logistic regression on all latents; with a ``kind``, on its own of everybody's texts.

        The label frequencies are discounted, as in training.
        """
        z = torch.cat([self.tasks[k if kind is None else kind].pool_z[s] for k, s in self.owned])
        labels = torch.cat([self.labels[share] for _, share in self.owned])
        counts = torch.bincount(labels, minlength=self.count) + 0.1 * len(labels) / self.count
        prior = torch.log(counts / counts.sum())
        fitted = []
        for penalty in _PENALTIES:
            weight, bias = read_out(z, labels, penalty)
            missing = self.count - weight.shape[1]
            weight = torch.nn.functional.pad(weight, (0, missing))
            bias = torch.nn.functional.pad(bias, (0, missing), value=float(bias.min()))
            fitted.append((weight, bias - prior))
        return fitted


def rows(classes: Classes, metric: Callable[[float], np.ndarray[Any, Any]]) -> dict[str, float]:
    """Every row of one draw."""
    everybody, least, prior = range(len(classes.tasks)), OPTIONS.least, OPTIONS.prior

    def pooled(power: float = 1.0, least: int = least, prior: float = prior) -> float:
        fitted = classes.pooled(metric(power), least, prior, everybody)
        return classes.accuracy(lambda _: fitted)

    found = {
        "pooled": pooled(),
        "own_type": classes.accuracy(lambda k: classes.pooled(metric(1.0), least, prior, [k])),
    }
    found |= {f"least_{n}": pooled(least=n) for n in (1, 3, 4)}
    found |= {f"prior_{k}": pooled(prior=k) for k in (0, 1, 4, 8)}
    found |= {f"power_{p:g}": pooled(power=p) for p in (0.0, 0.5, 2.0, 3.0)}
    one = classes.trained(None)
    moved = [classes.trained(kind) for kind in everybody]
    for index, penalty in enumerate(_PENALTIES):
        found[f"trained_{penalty:g}"] = classes.accuracy(lambda _, i=index: one[i])  # type: ignore[misc]
        found[f"moved_{penalty:g}"] = classes.accuracy(lambda k, i=index: moved[k][i])  # type: ignore[misc]
    return found


def measure(family: str) -> dict[str, Any]:
    """All rows of one family."""
    task = load_task()
    types = [load_type(name, task, (ALIGNMENT.anchors,)) for name in present(family)]
    lab = Laboratory(task, types)
    result = lab.align(types, ALIGNMENT, METHOD)
    tasks = lab.latent_tasks(types, result)
    spreads = np.asarray(result.anchor_latents["slots.0.weights"], np.float64)
    rho = spreads ** (1 / ALIGNMENT.weighting)
    values: dict[str, Any] = {}
    for clients in CLIENTS:
        drawn = [
            rows(Classes(lab, tasks, clients, seed), lambda power: rho**power / spreads**2)
            for seed in SEEDS
        ]
        row = {name: round(float(np.mean([d[name] for d in drawn])), 1) for name in drawn[0]}
        for what in ("trained", "moved"):
            row[what] = max(row.pop(f"{what}_{penalty:g}") for penalty in _PENALTIES)
        values[f"{clients} per type"] = row
        print(family, clients, "per type:", row, flush=True)
    return values


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=["tiny"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    for family in args.families:
        write_results("discriminant", {"seeds": list(SEEDS), family: measure(family)})


if __name__ == "__main__":
    main()
