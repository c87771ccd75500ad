"""What the numbers in a client's reports are called: of which model, on which examples, and what was measured."""

from __future__ import annotations

from typing import NamedTuple

#: What a client chooses among after the last round, in this order: of equals it takes the first.
BARE, ALONE, FEDERATED = "bare", "alone", "federated"
MODELS = (BARE, ALONE, FEDERATED)
#: What people read for them.
MODEL_TITLES = {BARE: "untouched", ALONE: "alone", FEDERATED: "federated"}
#: The common test, and a client's own.
TESTS = ("global", "personal")
SCOPES = (*TESTS, "choosing")
#: What is measured in a test; the last two where answers are generated.
MEASURED = ("accuracy", "loss", "exact_match", "rouge_l")


class Metric(NamedTuple):
    """What a metric is of: a model, a set of examples (empty for a training), and what was measured."""

    model: str
    scope: str
    measure: str


def metric_of(name: str) -> Metric:
    """Take a metric's name apart: ``alone_personal_loss``, ``global_accuracy`` (of the federated model), ``loss``."""
    model, _, rest = name.partition("_")
    if model not in MODELS:
        model, rest = FEDERATED, name
    scope, _, measure = rest.partition("_")
    return Metric(model, scope, measure) if scope in SCOPES else Metric(model, "", rest)
