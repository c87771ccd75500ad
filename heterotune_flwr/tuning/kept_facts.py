"""What is known about a client's kept record (:mod:`.kept_model`): ``kept.json``, without the tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from heterotune_flwr.jsons import read_as
from heterotune_flwr.protocol.metrics import MODELS
from heterotune_flwr.schema import MethodConfig

#: Raised when what stands in the files changes its meaning.
FORMAT = 2
#: The version that knew no own rounds is read as a record without them.
BEFORE_OWN_ROUNDS = 1
#: Settings of an adapter that records of before have besides.
_GONE = ("experts_type", "experts_private", "private_dropout")


@dataclass(frozen=True)
class KeptBackbone:
    """How the frozen model is found again: where from, at which bits and dtype, and its digest."""

    source: str
    bits: str
    revision: str | None
    fingerprint: str
    dtype: str


@dataclass(frozen=True)
class KeptForm:
    """How an example becomes text for the model, and how long it and its answer may be.

    ``turns``: whether examples were conversations, whose turns the prompt does not wrap.
    """

    prompt: str
    template: str
    system: str | None
    max_length: int
    max_answer_tokens: int
    stop: str | None
    turns: bool = False


@dataclass(frozen=True)
class Measured:
    """One model on the choosing set.

    ``loss``: mean over its examples; ``error``: standard error of the mean paired difference from the bare model, 0 of
    that itself. ``measure``: accuracy (labels) or ROUGE-L (generated text), 0 to 1; None where neither is taken.
    """

    loss: float
    error: float
    measure: float | None


@dataclass(frozen=True)
class Choosing:
    """On how many examples a client chose, and what each model came to there (none of them without examples)."""

    examples: int
    models: dict[str, Measured]


@dataclass(frozen=True, kw_only=True)
class KeptFacts:
    """What stands in ``kept.json``.

    Attributes
    ----------
    experiment, strategy, seed, rounds
        Of which run it is, and after how many rounds.
    client_id, type_key, backbone
        Whose it is, and on which model.
    method
        The adapter's settings, ``output`` resolved.
    labels, loss, form
        The closed label set (None: open text), the loss (``labels`` or ``tokens``), and how examples are written.
    maps_digest
        Which frozen maps the adapter reads through; empty where it has none.
    took, choosing
        ``bare``, ``alone`` or ``federated``, and what that was decided by.
    tests
        Model -> ``{personal,global}_{loss,accuracy,examples,...}``, as measured with its prior and channels.
    examples
        Own examples: ``train``, ``choosing`` and ``personal``.
    prior
        C numbers that own tests add to the labels' logits of ``alone`` and ``federated``; None: nothing is added.
    own_rounds
        How many rounds on own examples alone ``federated`` has had after the run's.
    shared_tests
        How it did before those, as one of ``tests``; empty where there were none.

    """

    experiment: str
    strategy: str
    seed: int
    rounds: int
    client_id: str
    type_key: str
    backbone: KeptBackbone
    method: MethodConfig
    labels: list[str] | None
    loss: str
    form: KeptForm
    maps_digest: str
    took: str
    choosing: Choosing
    tests: dict[str, dict[str, float]]
    examples: dict[str, int]
    prior: list[float] | None
    own_rounds: int = 0
    shared_tests: dict[str, float] = field(default_factory=dict)
    format: int = FORMAT


def read_facts(plain: Any) -> KeptFacts:
    """Facts from their JSON (ValueError: they are none, or of another version)."""
    if isinstance(plain, dict):
        if plain.get("format") == BEFORE_OWN_ROUNDS:
            plain = {**plain, "own_rounds": 0, "shared_tests": {}, "format": FORMAT}
        plain = {**plain, "method": _of_today(plain.get("method"))}
    facts: KeptFacts = read_as(KeptFacts, plain, "it")
    if facts.took not in MODELS or facts.format != FORMAT:
        raise ValueError("its model or format is not known here")
    return facts


def _of_today(method: Any) -> Any:
    """An adapter's settings without those that have gone (ValueError: it has experts which are no more)."""
    if not isinstance(method, dict):
        return method
    if method.get("experts_type") or method.get("experts_private"):
        raise ValueError("it has experts that a type or a client has alone, which are no more")
    return {name: value for name, value in method.items() if name not in _GONE}
