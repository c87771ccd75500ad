"""A client's experts after a run: the ways to answer with them, each fitted on the choosing set, and how they do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from benchmarks.science.laboratory.mixtures import Mixture, acting, answers_of, mixture
from heterotune_flwr.channels.statistics.client import classifier_logits
from heterotune_flwr.channels.statistics.record import LinearClassifier
from heterotune_flwr.client.local_training import RoundLog, train_round
from heterotune_flwr.client.node import Client
from heterotune_flwr.client.take_home import SHARES
from heterotune_flwr.data.text_metrics import rouge_l
from heterotune_flwr.dema.bank import initial_tensors
from heterotune_flwr.protocol.messages import Header
from heterotune_flwr.protocol.metrics import ALONE, BARE, FEDERATED
from heterotune_flwr.schema import TrainConfig
from heterotune_flwr.tuning.choice import choose
from heterotune_flwr.tuning.client_state import ClientStore
from heterotune_flwr.tuning.evaluate import ExampleResults, evaluate_examples
from heterotune_flwr.tuning.kept_model import KeptModel, Tensors
from heterotune_flwr.tuning.states import Rows, make_rows

#: Own rounds that ``stopped`` and ``continued`` may have.
_ALONE, _FURTHER = (1, 2, 3, 5, 7), (0, 1, 2)
#: Weights of the private expert that ``mixed`` may have.
_STEPS = (0.0, 0.25, 0.5, 0.75, 1.0)
#: Weight of the squares of a gate's numbers beside the loss.
_RIDGE = 0.01
_FOLDS = 5
#: Losses by example, and scores.
Judged = tuple[ExampleResults, Any]


@dataclass(frozen=True)
class Way:
    """One way to answer: what experts add, and how much class statistics and label frequencies act."""

    adds: Mixture
    share: float = 0.0
    prior: float = 0.0
    weights: tuple[float, ...] = ()


class Reach:
    """A client, its experts, and what can be made of them."""

    def __init__(self, client: Client, kept: KeptModel, answers: int) -> None:
        assert kept.alone is not None
        self.client, self.kept, self._answers = client, kept, answers
        self.task, self.adapter = client.task(), client.adapter(kept.method)
        store = ClientStore(client.identity.state_dir, kept.experiment, kept.client_id)
        self.adapter.load_maps(store.load_maps(kept.maps_digest) or {}, kept.maps_digest)
        header = Header(kept.experiment, kept.seed, kept.method, kept.rounds)
        self._header, self._rounds = header, RoundLog(store, header, kept.maps_digest).read()
        self.labels = self.task.kind == "labels"
        self.prior = None if kept.prior is None else torch.tensor(kept.prior)
        self._heads: dict[str, Tensor] = {}

    def ways(self) -> dict[str, Way]:
        """Every row's way to answer, fitted on the choosing set alone."""
        alone, federated = self._adds(self.kept.alone), self._adds(self.kept.as_shared)
        found = {
            BARE: Way(mixture([], ())),
            ALONE: Way(alone, prior=1.0),
            FEDERATED: self._best([Way(federated, share, 1.0) for share in self._shares]),
            "stopped": self._best([Way(self._adds(v), prior=1.0) for v in self._alone_after()]),
            "continued": self._best(
                [Way(self._adds(v), s, 1.0) for v in self._continued() for s in self._shares]
            ),
            "gate": self._gate([alone, federated]),
            "gate_alone": self._gate([alone]),
            "gate_by_input": self._gate([alone, federated], by_input=True),
        }
        mixed = self._best([
            Way(mixture([alone, federated], (t, 1 - t)), share, 1.0, (t, 1 - t))
            for t in _STEPS for share in self._shares
        ])  # fmt: skip
        judged = self._judged(
            {name: found[name] for name in (BARE, ALONE, FEDERATED, "continued")} | {"mixed": mixed}
        ) | {"gate": self._crossed([alone, federated])}
        self.took = _taken(judged, FEDERATED)
        found["switch"] = found[self.took]
        found["kept"] = found[_taken(judged, "continued")]
        found["mixed"] = {**found, "mixed": mixed}[_taken(judged, "mixed")]
        found["gated"] = found[_taken(judged, "gate")]
        return found

    # -- experts

    def _adds(self, values: Tensors) -> Mixture:
        """What an adapter with these values adds to final states."""
        return mixture([acting(self.adapter, values)], (1.0,))

    def _train(self, values: Tensors, number: int) -> Tensors:
        """These values after one more round on own examples, by the settings of the run's round ``number``."""
        settings = self._rounds[min(number, len(self._rounds)) - 1]
        asked = replace(self._header, round=100 + number, train=TrainConfig(**settings.train))
        one = self.client.by(asked)
        self.adapter.load(values)
        self.adapter.train_from(0, settings.frozen)
        train_round(one, asked, self.adapter, one.task(), one.encoded("train", self.kept.seed))
        return self.adapter.read()

    def _alone_after(self) -> list[Tensors]:
        values = initial_tensors(self.adapter.shapes, self.kept.seed)
        found = []
        for number in range(1, max(_ALONE) + 1):
            values = self._train(values, number)
            if number in _ALONE:
                found.append(values)
        return found

    def _continued(self) -> list[Tensors]:
        found = [self.kept.as_shared]
        for number in _FURTHER[1:]:
            found.append(self._train(found[-1], len(self._rounds) + number))
        return found

    # -- choosing

    @property
    def _shares(self) -> Sequence[float]:
        return SHARES if self.kept.head is not None else (0.0,)

    def _best(self, ways: Sequence[Way]) -> Way:
        """Of several the one with the lowest loss on the choosing set."""
        return min(ways, key=lambda way: self.results(way, "choosing").loss)

    def _judged(self, ways: Mapping[str, Way]) -> dict[str, Judged]:
        """How some ways do on the choosing set."""
        results = {name: self.results(way, "choosing") for name, way in ways.items()}
        scores = self._scores(ways, "choosing", results)
        return {name: (results[name], scores[name]) for name in ways}

    def _crossed(self, experts: Sequence[Mixture]) -> Judged:
        """Loss and score of the choosing examples, each by a gate that was fitted without it."""
        count = len(self.client.encoded("choosing", self.kept.seed))
        fold = np.arange(count) % _FOLDS
        ways = {
            str(k): self._gate(experts, examples=np.flatnonzero(fold != k).tolist())
            for k in range(_FOLDS)
        }
        judged, own = self._judged(ways), [str(k) for k in fold]
        losses, right = (
            np.array([getattr(judged[k][0], which)[i] for i, k in enumerate(own)])
            for which in ("losses", "right")
        )
        scored = [judged[k][1][i] for i, k in enumerate(own) if i < len(judged[k][1])]
        return ExampleResults(losses, right), np.array(scored)

    def _gate(
        self,
        experts: Sequence[Mixture],
        by_input: bool = False,
        examples: Sequence[int] | None = None,
    ) -> Way:
        """Fit the weights of experts (at least 0, together at most 1), by a convex program on the choosing set.

        ``by_input``: weights are a softmax over the experts and the bare model of how far each moves a state.
        ``examples``: by which alone it is fitted.
        """
        count, encoded = len(experts), self.client.encoded("choosing", self.kept.seed)
        numbers = count * (count + 1) if by_input else count
        rows = make_rows(self.adapter, encoded)
        chosen = range(len(rows)) if examples is None else examples
        head = self._head("choosing")
        head = None if head is None else head[list(chosen)]

        def way(values: Tensor) -> Way:
            weights = _by_input(values[:numbers], count) if by_input else values[:numbers]
            return Way(mixture(experts, weights), *values[numbers:])

        def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
            given = torch.tensor(values, dtype=torch.float32, requires_grad=True)
            one = way(given)
            with torch.enable_grad(), one.adds.at_work(self.adapter):
                states, targets, _ = rows.rows(chosen)
                losses, _ = self.task.losses(states, targets, self._offsets(one, head))
                total = losses.mean() + _RIDGE * given.square().sum()
                total.backward()
            assert given.grad is not None
            return float(total.detach()), given.grad.double().numpy()

        begin = np.zeros(numbers) if by_input else np.full(numbers, 1 / (count + 1))
        more = [0.5, 0.5] if self.labels else []
        bounds = [(-8, 8) if by_input else (0, 1)] * numbers + [(0, 1)] * len(more)
        together = {"type": "ineq", "fun": lambda values: 1 - values[:numbers].sum()}
        fitted = minimize(
            loss, np.concatenate([begin, more]), jac=True, method="SLSQP", bounds=bounds,
            constraints=[] if by_input else [together], options={"maxiter": 60},
        )  # fmt: skip
        found = way(torch.tensor(fitted.x, dtype=torch.float32))
        return replace(
            found, share=float(found.share), prior=float(found.prior), weights=tuple(fitted.x)
        )

    # -- measuring

    def results(self, way: Way, part: str) -> ExampleResults:
        """Loss of every example of a part, and whether it is right; label frequencies are of own data alone."""
        encoded = self.client.encoded(part, self.kept.seed)
        if part == "global":
            way = replace(way, prior=0.0)
        offsets = self._offsets(way, self._head(part))
        rows: Rows = make_rows(self.adapter, encoded, offsets=offsets if self.labels else None)
        with way.adds.at_work(self.adapter):
            return evaluate_examples(self.task, rows)

    def _head(self, part: str) -> Tensor | None:
        """What class statistics add to the labels' logits of a part's examples (zeros: nothing), ``n x C``."""
        if not self.labels:
            return None
        if part not in self._heads:
            encoded, held = self.client.encoded(part, self.kept.seed), self.kept.head
            self._heads[part] = (
                torch.zeros(len(encoded), len(self.task.labels or ()))
                if held is None
                else classifier_logits(LinearClassifier(held.weight, held.bias), self.adapter, self.task, encoded)
            )  # fmt: skip
        return self._heads[part]

    def _offsets(self, way: Way, head: Tensor | None) -> Tensor | None:
        if head is None:
            return None
        return way.share * head + (0.0 if self.prior is None else way.prior * self.prior)

    def measured(self, ways: Mapping[str, Way], part: str) -> dict[str, tuple[Any, Any]]:
        """Loss and score by example of every way."""
        results = {name: self.results(way, part) for name, way in ways.items()}
        scores = self._scores(ways, part, results)
        return {name: (results[name].losses, scores[name]) for name in ways}

    def _scores(
        self, ways: Mapping[str, Way], part: str, results: Mapping[str, ExampleResults]
    ) -> dict[str, Any]:
        """Right or not, or the ROUGE-L of generated answers, by example."""
        if self.labels:
            return {name: each.right.astype(float) for name, each in results.items()}
        examples = self.client.examples(part, self.kept.seed)[: self._answers]
        different = {id(way.adds): way.adds for way in ways.values()}
        data = self.client.identity.data
        written = answers_of(self.adapter, self.task, list(different.values()), examples, data)
        by_way = dict(zip(different, written, strict=True))
        return {
            name: np.array([
                rouge_l(answer, example.answers)
                for answer, example in zip(by_way[id(way.adds)], examples, strict=True)
            ])
            for name, way in ways.items()
        }  # fmt: skip


def _taken(judged: Mapping[str, Judged], name: str) -> str:
    """What the product's rule takes of the bare model, the one alone, and another in the federated one's place."""
    three = {BARE: judged[BARE], ALONE: judged[ALONE], FEDERATED: judged[name]}
    results = {key: each[0] for key, each in three.items()}
    took, _ = choose(results, lambda key: three[key][1])
    return name if took == FEDERATED else took


def _by_input(values: Tensor, count: int) -> Callable[[Sequence[Tensor]], Tensor]:
    """Weights of experts by what they add: softmax of ``c + W log|u|``, the bare model's logit being 0."""
    biases, slopes = values[:count], values[count:].view(count, count)

    def weights(added: Sequence[Tensor]) -> Tensor:
        moved = torch.stack([u.norm(dim=-1) for u in added], -1).clamp_min(1e-6).log()
        logits = biases + moved @ slopes.T
        return torch.cat([logits, torch.zeros_like(logits[..., :1])], -1).softmax(-1)[..., :count]

    return weights
