"""Of models: side by side, outcomes, confusions, answers, curves, as :class:`.facts.RunFacts` holds them."""

from __future__ import annotations

from dataclasses import dataclass, field

from heterotune_flwr.protocol.metrics import MODELS

BARE, ALONE, FEDERATED = MODELS
MAJORITY, WITHIN_TYPE = "majority", "within_type"
#: Kinds of rows that stand side by side, from the floor up.
KINDS = (BARE, MAJORITY, ALONE, WITHIN_TYPE, FEDERATED)
#: In ``type_key`` of a number over all types.
ALL_TYPES = "all"


@dataclass
class Spread:
    """A measure over clients: ``worst`` of a loss is its largest; ``worst10`` the mean over the worst tenth."""

    mean: float
    std: float = 0.0
    worst: float | None = None
    worst10: float | None = None
    clients: int = 0


@dataclass
class SideBySide:
    """One row of the table of models.

    ``kind`` is one of :data:`KINDS`. ``strategy`` is the one it was trained by, or in whose last test the clients
    measured it (``bare``; ``alone`` beside a federated strategy). ``scope``: ``global`` (the common test) or
    ``personal`` (own tests). ``scores``: ``accuracy``, ``loss``, ``exact_match``, ``rouge_l``, ``macro_f1``.
    """

    kind: str
    title: str
    strategy: str
    seed: int
    scope: str
    type_key: str = ALL_TYPES
    scores: dict[str, Spread] = field(default_factory=dict)
    note: str = ""


@dataclass
class Gains:
    """By how much a model is better than the untouched and the lone one (losses: lower is better, so positive too)."""

    measure: str
    scope: str
    federated_over_bare: float | None = None
    federated_over_alone: float | None = None
    taken_over_bare: float | None = None
    taken_over_alone: float | None = None


@dataclass
class ClientOutcome:
    """One client after the last round of one strategy and seed.

    ``models``: ``bare``, ``alone``, ``federated``, ``taken`` -> ``global``, ``personal`` -> measure -> value.
    ``took`` is empty where nothing was chosen, or it was not told; ``chosen_by`` are the examples set aside that it was
    chosen by, ``choosing_loss`` each model's loss on them, in nats; ``own_rounds`` are those of the federated one.
    ``gains`` are in the run's main measure.
    ``elsewhere``: of models that this strategy did not measure, which one did: model -> strategy.
    """

    client_id: str
    type_key: str
    strategy: str
    seed: int
    took: str = ""
    chosen_by: int | None = None
    models: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    gains: Gains | None = None
    elsewhere: dict[str, str] = field(default_factory=dict)
    choosing_loss: dict[str, float] = field(default_factory=dict)
    own_rounds: int = 0


@dataclass
class TypeOutcome:
    """One type (or :data:`ALL_TYPES`) after the last round of one strategy and seed.

    ``before`` and ``after``: ``global``, ``personal`` -> measure -> spread over clients. ``took``: model -> clients.
    ``gains`` are means over clients.
    """

    type_key: str
    strategy: str
    seed: int
    clients: int = 0
    before: dict[str, dict[str, Spread]] = field(default_factory=dict)
    after: dict[str, dict[str, Spread]] = field(default_factory=dict)
    took: dict[str, int] = field(default_factory=dict)
    gains: Gains | None = None


@dataclass
class Confusion:
    """How often which label was answered: ``counts[right][answered]``, in the order of ``labels``.

    ``model``: ``bare``, ``alone`` or ``federated``; ``f1`` by label (None where it neither occurred nor was answered).
    """

    strategy: str
    seed: int
    model: str
    scope: str
    type_key: str
    labels: list[str]
    counts: list[list[int]]
    examples: int
    accuracy: float
    macro_f1: float
    f1: dict[str, float | None]


@dataclass
class SampledAnswer:
    """One example of a client's test and what each model answers to it; ``answers``: model -> text."""

    client_id: str
    type_key: str
    strategy: str
    seed: int
    prompt: str
    reference: str
    answers: dict[str, str] = field(default_factory=dict)


@dataclass
class Curve:
    """A number over rounds; ``bytes[i]`` is what training has moved both ways by ``rounds[i]``.

    ``measure``: ``train_loss``, ``train_accuracy``, or of tests ``global_accuracy``, ``personal_loss``, ...
    """

    strategy: str
    seed: int
    measure: str
    type_key: str
    rounds: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    bytes: list[int | None] = field(default_factory=list)
