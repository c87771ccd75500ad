"""What a client tells of its last test for a run's report, as far as it was asked and its owner allows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from heterotune_flwr.client.node import Client
from heterotune_flwr.client.testing import Tested
from heterotune_flwr.protocol.details import COUNTS, SHOWN, TEXTS, Details, Pairs, shortened
from heterotune_flwr.protocol.messages import EvaluateRequest
from heterotune_flwr.tuning.task import Task


def details_of(
    client: Client, request: EvaluateRequest, task: Task, tests: Mapping[str, Sequence[Tested]]
) -> Details:
    """Counts of labels and mistakes, and a few answers; ``tests``: of every model, by its name."""
    allowed, seed = client.guard.details(request), request.header.seed
    closed = task.kind == "labels" and task.labels is not None
    labels: list[int] = []
    confusion: dict[str, dict[str, Pairs]] = {}
    if COUNTS in allowed and closed:
        assert task.labels is not None
        mix = Counter(example.label for example in client.examples("train", seed))
        labels = [mix[label] for label in task.labels] if mix else []
        for model, each in tests.items():
            for test in each:
                if test.confusion:
                    confusion.setdefault(test.scope, {})[model] = test.confusion
    return Details(labels, confusion, _answers(client, seed, tests) if TEXTS in allowed else [])


def _answers(
    client: Client, seed: int, tests: Mapping[str, Sequence[Tested]]
) -> list[dict[str, str]]:
    """The first examples of its own test (of the common one where it has none) with every model's answer."""
    scopes = {test.scope for each in tests.values() for test in each if test.answers}
    if not scopes:
        return []
    scope = "personal" if "personal" in scopes else "global"
    examples, _ = client.asked(scope, seed)
    found = [
        {"prompt": shortened(example.text), "reference": shortened(example.label)}
        for example in examples[:SHOWN]
    ]
    for model, each in tests.items():
        for test in (test for test in each if test.scope == scope):
            for place, answer in zip(found, test.answers, strict=False):
                place[model] = shortened(answer)
    return found
