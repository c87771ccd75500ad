"""What pooled class statistics know: classes pooled over model types in closed form, against training on all latents.

In the laboratory (:mod:`.laboratory`: frozen states, the product's alignment, partition and closed form). Accuracy
on the global test in percent, mean over types and seeds, with 1, 2, 4 and 16 clients per type:

* ``pooled``: the discriminant of all clients' class sums, each told behind its own type's maps, with both views of a
  text; ``last`` and ``text``: with one of them; ``words`` and ``middle``: both, but for one half of the second;
  ``own_type``: both, of one's own type's clients alone;
* ``trained``: logistic regression on everybody's latents at once, which no federation could do (the penalty of three
  that does best on these very tests); ``moved``: the same with everybody's *texts* read by one's own model;
* ``model_free``: a rival without any model, the same closed form on a text's character n-grams
  (:mod:`.ngrams`; ``pip install -e '.[benchmarks]'``); ``beside_model_free``: ``pooled`` and it;
* ``wrong`` and ``shuffled``: ``pooled`` for the other types, where one type calls every class by the next one's
  name, or its examples by each other's; ``.all``: with everybody's classes pooled all the same, ``.found``: how often
  (percent) the type was left to its own classes; ``honest.found``: how often one was where nobody went wrong;
* what its options do: ``least`` (examples of a class below which a client tells nothing), ``prior``, and the power of
  each latent's correlation in the metric (1 in the product).

Run: ``python -m benchmarks.science.statistics`` (minutes per backbone once, then minutes).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.runner import arguments, say, write_results
from benchmarks.science.laboratory.clients import draw_clients
from benchmarks.science.laboratory.rows import (
    ALIGNMENT,
    FAMILIES,
    METHOD,
    Laboratory,
    laboratories,
    read_out,
)
from benchmarks.science.laboratory.states import parse
from benchmarks.science.ngrams import AXES, CLIENTS, SEEDS, NgramView, told
from heterotune_flwr.alignment.factors import collect_view, view_components
from heterotune_flwr.alignment.maps import compute_maps
from heterotune_flwr.alignment.public_texts import load_anchors
from heterotune_flwr.backbones.loading import load_backbone
from heterotune_flwr.backbones.sources import BackboneSpec
from heterotune_flwr.backbones.views import VIEWS
from heterotune_flwr.channels.statistics.agreement import who_agrees
from heterotune_flwr.channels.statistics.class_pool import Classes as Told
from heterotune_flwr.channels.statistics.server import StatisticsOptions, linear_discriminant

OPTIONS = StatisticsOptions()
_PENALTIES = (1e-2, 3e-2, 1e-1)
Fitted = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class View:
    """Latents of the task's texts (by type: pool, test) and their standard deviations over the anchors."""

    pool: list[Tensor]
    test: list[Tensor]
    spreads: NDArray[np.float64]

    def metric(self, power: float = 1.0) -> NDArray[np.float64]:
        """The product's, with another power of the correlations."""
        rho: NDArray[np.float64] = self.spreads ** (power / ALIGNMENT.weighting)
        return rho / self.spreads**2

    def beside(self, other: View) -> View:
        """Both, one after the other."""
        pool = [torch.cat(pair, dim=1) for pair in zip(self.pool, other.pool, strict=True)]
        test = [torch.cat(pair, dim=1) for pair in zip(self.test, other.test, strict=True)]
        return View(pool, test, np.concatenate([self.spreads, other.spreads]))


def last_view(lab: Laboratory) -> View:
    """Of the final state where the answer is read."""
    result = lab.align(lab.types, ALIGNMENT, METHOD)
    tasks = lab.latent_tasks(lab.types, result)
    return View(
        [task.pool_z for task in tasks],
        [task.test_z for task in tasks],
        np.asarray(result.anchor_latents["slots.0.weights"], np.float64),
    )


TEXT = "text"
#: Anchors, pool and test as one type reads whole texts.
Read = list[NDArray[np.float32]]


def text_states(lab: Laboratory) -> dict[str, Read]:
    """The second view of all texts, by type: of their words, and beside it halfway up."""
    anchors, states = load_anchors(ALIGNMENT), {}
    for name, own in zip(lab.names, lab.types, strict=True):
        backbone = load_backbone(BackboneSpec(*parse(name)))
        say(f"{name}: reading whole texts")
        states[own.name] = [
            collect_view(VIEWS[TEXT], backbone, texts, lab.task.data)
            for texts in (anchors, lab.task.pool, lab.task.test)
        ]
    return states


def text_view(lab: Laboratory, states: Mapping[str, Read]) -> View:
    """Of whole texts, read as ``states``."""
    factors = {}
    for own in lab.types:
        parts = view_components(VIEWS[TEXT], states[own.name][0], ALIGNMENT)
        factors[own.name] = {
            name.replace(TEXT, "slots.0", 1): value for name, value in parts.items()
        }
        factors[own.name]["label_rows"] = own.label_rows.astype(np.float64)
    result = compute_maps(factors, ALIGNMENT, METHOD, lab.task.labels)

    def latents(which: int) -> list[Tensor]:
        found = []
        for own in lab.types:
            maps = result.maps[own.name]
            z = states[own.name][which] @ maps["slots.0.map.down.weight"].T
            found.append(torch.from_numpy(z + maps["slots.0.map.down.bias"]).float())
        return found

    spreads = np.asarray(result.anchor_latents["slots.0.weights"], np.float64)
    return View(latents(1), latents(2), spreads)


def model_free_view(lab: Laboratory) -> View:
    """Of character n-grams, which are the same for all types."""
    view = NgramView(load_anchors(ALIGNMENT))
    pool, test = (torch.from_numpy(view.of_texts(t)) for t in (lab.task.pool, lab.task.test))
    return View([pool] * len(lab.types), [test] * len(lab.types), np.ones(AXES))


def _half(states: NDArray[np.float32], which: int) -> NDArray[np.float32]:
    return np.split(states, 2, axis=1)[which]


def fitted_to(parts: Sequence[Told], metric: NDArray[np.float64], prior: float) -> Fitted:
    """The discriminant of some types' classes together."""
    together = functools.reduce(operator.add, parts)
    found = linear_discriminant(together.counts, together.sums, metric, prior)
    return torch.from_numpy(found.weight).T, torch.from_numpy(found.bias)


class Draw:
    """The clients of one draw, and what can be made of their classes."""

    def __init__(self, lab: Laboratory, clients: int, seed: int) -> None:
        self.labels, self.test_y = lab.targets
        self.count, self.types = int(self.labels.max()) + 1, len(lab.types)
        shares = draw_clients(lab.task.data, clients * self.types, [seed], lab.index)
        # The product's order: types in turn.
        self.owned = [(number % self.types, share) for number, share in enumerate(shares)]

    def accuracy(
        self, view: View, solved: Callable[[int], Fitted], kinds: Sequence[int] | None = None
    ) -> float:
        """Mean over types (or some) of what is solved for each, in percent."""
        found = []
        for kind in range(self.types) if kinds is None else kinds:
            weight, bias = solved(kind)
            right = (view.test[kind] @ weight + bias).argmax(1) == self.test_y
            found.append(100 * float(right.double().mean()))
        return float(np.mean(found))

    def told(self, view: View, least: int, struck: int = -1, trouble: str = "") -> dict[str, Told]:
        """What every type's clients tell; those of type ``struck`` of other labels."""
        found: dict[str, Told] = {}
        for number, (kind, share) in enumerate(self.owned):
            labels = self.labels[share]
            if kind == struck and trouble == "wrong":
                labels = (labels + 1) % self.count
            elif kind == struck:
                order = np.random.default_rng(number).permutation(len(labels))
                labels = labels[torch.from_numpy(order)]
            z = view.pool[kind][share].double().numpy()
            new = told(z, labels.numpy(), self.count, least)
            found[str(kind)] = found[str(kind)] + new if str(kind) in found else new
        return found

    def classifier(
        self, view: View, kinds: Sequence[int], least: int, prior: float, power: float
    ) -> Fitted:
        """That of the classes of some types' clients."""
        told = self.told(view, least)
        return fitted_to([told[str(kind)] for kind in kinds], view.metric(power), prior)

    def troubled(self, view: View, trouble: str) -> dict[str, float]:
        """What the other types know where one goes wrong, averaged over which does."""
        metric, found = view.metric(), []
        for struck in range(self.types):
            told = self.told(view, OPTIONS.min_count, struck, trouble)
            _, alone = who_agrees(told, metric, OPTIONS.min_cosine)
            healthy = [kind for kind in range(self.types) if kind != struck]
            pool = [c for key, c in told.items() if key not in alone] or list(told.values())
            guarded, everybody = (
                fitted_to(parts, metric, OPTIONS.prior) for parts in (pool, list(told.values()))
            )
            by_itself = {k: fitted_to([told[k]], metric, OPTIONS.prior) for k in alone}
            found.append([
                self.accuracy(view, lambda k, g=guarded, own=by_itself: own.get(str(k), g), healthy),  # type: ignore[misc]
                self.accuracy(view, lambda _, f=everybody: f, healthy),  # type: ignore[misc]
                100.0 * (str(struck) in alone),
            ])  # fmt: skip
        names = (trouble, f"{trouble}.all", f"{trouble}.found")
        return dict(zip(names, np.mean(found, axis=0).tolist(), strict=True))

    def trained(self, view: View, reader: int | None) -> list[Fitted]:
        """Logistic regression on all latents; with a ``reader``, on that type's of everybody's texts.

        The label frequencies are discounted, as in training.
        """
        z = torch.cat([view.pool[k if reader is None else reader][s] for k, s in self.owned])
        labels = torch.cat([self.labels[share] for _, share in self.owned])
        counts = torch.bincount(labels, minlength=self.count) + 0.1 * len(labels) / self.count
        prior = torch.log(counts / counts.sum())
        solved = []
        for penalty in _PENALTIES:
            weight, bias = read_out(z, labels, penalty)
            missing = self.count - weight.shape[1]
            weight = torch.nn.functional.pad(weight, (0, missing))
            bias = torch.nn.functional.pad(bias, (0, missing), value=float(bias.min()))
            solved.append((weight, bias - prior))
        return solved


def rows(classes: Draw, views: dict[str, View]) -> dict[str, float]:
    """Every row of one draw."""
    both, everybody = views["pooled"], range(classes.types)

    def pooled(
        view: View = both, least: int = OPTIONS.min_count, prior: float = OPTIONS.prior,
        power: float = 1.0, kinds: Sequence[int] = everybody,
    ) -> float:  # fmt: skip
        solved = classes.classifier(view, kinds, least, prior, power)
        return classes.accuracy(view, lambda _: solved)

    def own(kind: int) -> Fitted:
        return classes.classifier(both, [kind], OPTIONS.min_count, OPTIONS.prior, 1.0)

    found = {name: pooled(view) for name, view in views.items()}
    found["own_type"] = classes.accuracy(both, own)
    for trouble in ("wrong", "shuffled"):
        found |= classes.troubled(both, trouble)
    told = classes.told(both, OPTIONS.min_count)
    _, alone = who_agrees(told, both.metric(), OPTIONS.min_cosine)
    found["honest.found"] = 100.0 * len(alone) / classes.types
    found |= {f"least_{n}": pooled(least=n) for n in (1, 3, 4)}
    found |= {f"prior_{k}": pooled(prior=k) for k in (0, 1, 4, 8)}
    found |= {f"power_{p:g}": pooled(power=p) for p in (0.0, 0.5, 2.0, 3.0)}
    one = classes.trained(both, None)
    moved = [classes.trained(both, kind) for kind in everybody]
    for index, penalty in enumerate(_PENALTIES):
        of_all, of_own = one[index], [solved[index] for solved in moved]
        found[f"trained_{penalty:g}"] = classes.accuracy(both, lambda _, f=of_all: f)  # type: ignore[misc]
        found[f"moved_{penalty:g}"] = classes.accuracy(both, of_own.__getitem__)
    return found


def views_of(lab: Laboratory) -> dict[str, View]:
    """Every way of reading a text."""
    states = text_states(lab)
    last, text = last_view(lab), text_view(lab, states)
    views = {"pooled": last.beside(text), "last": last, "text": text}
    for half, name in enumerate(("words", "middle")):
        one = {
            key: [np.tile(_half(part, half), 2) for part in read] for key, read in states.items()
        }
        views[name] = last.beside(text_view(lab, one))
    views["model_free"] = model_free_view(lab)
    return {**views, "beside_model_free": views["pooled"].beside(views["model_free"])}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--families", nargs="+", choices=sorted(FAMILIES), default=["tiny"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    for family, lab in laboratories(args.families, (ALIGNMENT.anchors,)):
        views = views_of(lab)
        for clients in CLIENTS:
            drawn = [rows(Draw(lab, clients, seed), views) for seed in SEEDS]
            row = {name: round(float(np.mean([d[name] for d in drawn])), 1) for name in drawn[0]}
            for what in ("trained", "moved"):
                row[what] = max(row.pop(f"{what}_{penalty:g}") for penalty in _PENALTIES)
            say(family, clients, "per type:", row)
            values = {"seeds": list(SEEDS), family: {f"{clients} per type": row}}
            write_results("statistics", values)


if __name__ == "__main__":
    main()
