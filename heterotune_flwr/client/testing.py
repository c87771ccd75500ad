"""What a client measures of a model on a set of examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from heterotune_flwr.channels.client_half import ClientWork
from heterotune_flwr.client.node import Client
from heterotune_flwr.protocol.details import Pairs
from heterotune_flwr.tuning.evaluate import (
    ExampleResults,
    evaluate,
    evaluate_examples,
    evaluate_once,
)
from heterotune_flwr.tuning.states import Rows, make_rows


@dataclass(frozen=True)
class Help:
    """What acts in a test besides the adapter.

    ``prior``: whether the client's label frequencies do, on its own examples; ``channels``: how much of what they add.
    """

    prior: bool = True
    channels: float = 1.0


#: What the federated model is tested with.
HELPED = Help()


@dataclass(frozen=True)
class Tested:
    """One model on one test set.

    ``metrics`` by measure, ``confusion`` as :class:`..tuning.evaluate.EvalReport` has it, ``answers`` to the first
    examples.
    """

    scope: str
    metrics: Mapping[str, float]
    confusion: Pairs = ()
    answers: Sequence[str] = ()

    @property
    def named(self) -> dict[str, float]:
        """Metrics as they travel: ``personal_loss``, ..."""
        return {f"{self.scope}_{name}": value for name, value in self.metrics.items()}


def merged(tests: Iterable[Tested]) -> dict[str, float]:
    """Metrics of several tests as they travel."""
    return {name: value for test in tests for name, value in test.named.items()}


def tested(client: Client, work: ClientWork, scope: str, help: Help) -> Tested:
    """Measure the adapter on one test set; nothing where the client has none of its own, in a run about own data."""
    seed, adapter, task = work.header.seed, work.adapter, work.task
    encoded = client.encoded(scope, seed)
    if not len(encoded):
        return Tested(scope, {})
    own = client.guard.own_test(scope)
    rows = _rows(client, work, scope, help)
    if scope != "global" or own:
        prior = _prior(client, scope, seed, help)
        report = evaluate(adapter, task, rows, prior, client.guard.most_loss(own))
    else:
        halves = work.channels.values() if help.channels else ()
        key = "".join(
            (task.data_key(encoded), str(help.channels), *(h.asked.digest for h in halves))
        )
        report = evaluate_once(adapter, task, rows, key)
    if not (client.identity.data.generate and task.kind == "tokens"):
        return Tested(scope, report.metrics, report.confusion)
    written = client.generation(adapter, scope, seed)
    return Tested(scope, report.metrics | written.metrics, answers=written.first)


def by_example(client: Client, work: ClientWork, scope: str, help: Help) -> ExampleResults:
    """Measure the adapter on each of the client's own examples (of at least one)."""
    prior = _prior(client, scope, work.header.seed, help)
    most = client.guard.most_loss(client.guard.own_test(scope))
    return evaluate_examples(work.task, _rows(client, work, scope, help), prior, most)


def _rows(client: Client, work: ClientWork, scope: str, help: Help) -> Rows:
    encoded = client.encoded(scope, work.header.seed)
    added = work.logits(encoded, "test") if help.channels else None
    offsets = None if added is None else help.channels * added
    return make_rows(work.adapter, encoded, client.config.train.cache_states, offsets=offsets)


def _prior(client: Client, scope: str, seed: int, help: Help) -> Tensor | None:
    return client.prior(seed) if help.prior and scope != "global" else None
