"""Everything a report says of a run, as plain values: ``RunFacts`` (:func:`.read.read_facts` fills it).

Accuracies, exact match and ROUGE-L are shares from 0 to 1, gains differences of shares (of losses: nats), losses nats
per answer, bytes bytes, times seconds; moments are seconds since 1970. ``None`` and empty mean: it was not measured, or
nobody told. Texts may come from clients: escape them for a page, and :func:`..names.printable` them for a terminal.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from heterotune_flwr.federation.journal import to_json
from heterotune_flwr.report.measured import (
    ClientOutcome,
    Confusion,
    Curve,
    SampledAnswer,
    SideBySide,
    TypeOutcome,
)


@dataclass
class Start:
    """One start of the run: ``torn_line`` says that the start before ended in the middle of a journal line."""

    time: float | None
    resumed: bool = False
    torn_line: bool = False
    program: str = ""


@dataclass
class Identity:
    """Which run it is and how it stands.

    ``state``: ``finished``, ``failed``, ``interrupted`` (stopped by a person or a kill), ``running`` or ``unknown``;
    ``reason`` is its own word on it. ``resumed`` counts starts after the first. ``simulated`` is None where no file
    says. ``task`` is ``labels``, ``text`` or empty. ``rounds`` are those planned for each strategy.
    ``data`` says in one line what was learned from; ``notes`` are what was said of one's own data before the run.
    """

    name: str
    directory: str
    state: str
    reason: str = ""
    created: float | None = None
    last_event: float | None = None
    resumed: int = 0
    starts: list[Start] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    simulated: bool | None = None
    seeds: list[int] = field(default_factory=list)
    strategies: list[str] = field(default_factory=list)
    subject: str = ""
    rounds: int | None = None
    clients: int = 0
    tested: int = 0
    task: str = ""
    labels: list[str] = field(default_factory=list)
    data: str = ""
    notes: list[str] = field(default_factory=list)
    bytes_on_disk: int = 0


@dataclass
class TypeFacts:
    """A model type; ``apart`` says why it shares nothing with others, ``guest`` that its clients do not train."""

    type_key: str
    backbone: str = ""
    bits: str = ""
    clients: int = 0
    guest: bool = False
    hidden: int | None = None
    layers: int | None = None
    parameters: int | None = None
    model_bytes: int | None = None
    lora16_bytes: int | None = None
    apart: str = ""


@dataclass
class ClientFacts:
    """A client over the whole run.

    ``state``: ``in``, or why it is not: ``left_out`` (never took part), ``cooldown`` at the end, ``lost`` (failed in
    the last round it was asked). ``why`` is the reason in its last word. ``label_mix``: label -> training examples;
    None where nobody told. ``peak_memory_mb`` is its process's.
    """

    client_id: str
    type_key: str = ""
    guest: bool = False
    state: str = "in"
    why: str = ""
    examples: int | None = None
    label_mix: dict[str, int] | None = None
    peak_memory_mb: float | None = None
    train_seconds: float | None = None
    answers: int = 0
    failures: int = 0
    refusals: int = 0
    cooldowns: int = 0
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass
class Alignment:
    """How well one place of one type's model is aligned: ``quality`` is its held-out canonical correlation.

    ``place`` is ``slot 0``, ... or ``view text``; ``shared`` whether the type shares there with other types.
    """

    seed: int
    type_key: str
    place: str
    quality: float
    threshold: float | None = None
    shared: bool | None = None
    cached: bool | None = None


@dataclass
class Agreement:
    """Over rounds, what types' updates of one slot have to do with each other (CMGA).

    ``cosines``: ``a|b`` -> cosine of the two types' updates; ``with_step``, ``norms``, ``weights``: type -> number;
    ``conflict_rate``: share of pairs that pull apart, where a transform tells. A list has an entry per round, None
    where the round does not tell.
    """

    strategy: str
    seed: int
    slot: str
    rounds: list[int] = field(default_factory=list)
    cosines: dict[str, list[float | None]] = field(default_factory=dict)
    with_step: dict[str, list[float | None]] = field(default_factory=dict)
    norms: dict[str, list[float | None]] = field(default_factory=dict)
    weights: dict[str, list[float | None]] = field(default_factory=dict)
    conflict_rate: list[float | None] = field(default_factory=list)


@dataclass
class ChannelFacts:
    """What a channel of a strategy said last: numbers by name; ``by_type`` those that each type has; notes."""

    strategy: str
    seed: int
    channel: str
    off: str = ""
    numbers: dict[str, float] = field(default_factory=dict)
    by_type: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Traffic:
    """Bytes of one strategy and seed by direction (``up``: to the server); ``one_time``: who is there, maps.

    Training has no one-time bytes in it. ``wire`` is all of it as Flower serialises it. ``up_each`` and ``down_each``
    are means over client-rounds. ``partial``: counted from the journal of an unfinished run.
    """

    strategy: str
    seed: int
    train_up: int = 0
    train_down: int = 0
    evaluate_up: int = 0
    evaluate_down: int = 0
    one_time_up: int | None = None
    one_time_down: int | None = None
    wire_up: int = 0
    wire_down: int = 0
    client_rounds: int = 0
    up_each: float | None = None
    down_each: float | None = None
    lora16_bytes: float | None = None
    model_bytes: float | None = None
    by_type: dict[str, dict[str, float]] = field(default_factory=dict)
    partial: bool = False


@dataclass
class Phase:
    """A stretch of time: ``asking``, ``aligning`` (set-up, shared by all strategies after it), ``training``, ...

    ``strategy`` is empty for shared set-up. ``clients_seconds`` is what clients computed meanwhile, added up.
    """

    name: str
    strategy: str
    seed: int | None
    seconds: float
    clients_seconds: float | None = None


@dataclass
class StrategyRun:
    """How far one strategy and seed got.

    ``kind`` is one of :data:`KINDS`; ``state``: ``finished``, ``unfinished``, ``not_started``. ``seconds`` are its
    own, without shared set-up. ``measure`` and ``scope``: what its clients are compared by.
    """

    strategy: str
    title: str
    seed: int
    kind: str
    state: str
    rounds_done: int = 0
    rounds_planned: int | None = None
    seconds: float | None = None
    peak_memory_mb: float | None = None
    skipped_rounds: list[int] = field(default_factory=list)
    resumed_after: list[int] = field(default_factory=list)
    personalized_from: int | None = None
    population: int = 0
    measure: str = ""
    scope: str = ""

    @property
    def key(self) -> tuple[str, int]:
        """Strategy and seed."""
        return self.strategy, self.seed


@dataclass
class Happening:
    """Something out of the ordinary.

    ``kind`` is the journal's event: ``refused``, ``payload_refused``, ``client_failed``, ``sent_again``, ``cooldown``,
    ``returned``, ``left_out``, ``skipped``, ``resumed``, ``shortened``, ``failed``, ``channel_off``, ``apart``, ...
    ``text`` is a whole sentence; ``times``: how often, where equal ones of a client are told as one. ``undone``: of a
    round that a resumed run did again.
    """

    kind: str
    text: str
    time: float | None = None
    strategy: str = ""
    seed: int | None = None
    round: int | None = None
    client_id: str = ""
    reason: str = ""
    times: int = 1
    undone: bool = False


@dataclass
class SettingFact:
    """A setting and who chose it: ``user``, ``preset``, ``default``; ``unknown`` in a run that does not say."""

    path: str
    value: Any
    default: Any
    origin: str
    help: str = ""


@dataclass
class Protection:
    """What protects whom: ``on`` None where no file of the run says; ``sentence`` is for a reader."""

    name: str
    protects: str
    on: bool | None
    sentence: str


@dataclass
class RunFacts:
    """One run.

    ``trouble`` says what of its files is missing or damaged, ``untold`` what nobody has told. ``has_results``: its
    results.json holds a strategy that has finished.
    """

    identity: Identity
    has_results: bool = False
    runs: list[StrategyRun] = field(default_factory=list)
    types: list[TypeFacts] = field(default_factory=list)
    clients: list[ClientFacts] = field(default_factory=list)
    side_by_side: list[SideBySide] = field(default_factory=list)
    type_outcomes: list[TypeOutcome] = field(default_factory=list)
    client_outcomes: list[ClientOutcome] = field(default_factory=list)
    confusions: list[Confusion] = field(default_factory=list)
    answers: list[SampledAnswer] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    alignment: list[Alignment] = field(default_factory=list)
    agreement: list[Agreement] = field(default_factory=list)
    channels: list[ChannelFacts] = field(default_factory=list)
    traffic: list[Traffic] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    happenings: list[Happening] = field(default_factory=list)
    settings: list[SettingFact] = field(default_factory=list)
    preset: str = ""
    protections: list[Protection] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)
    untold: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values; what JSON cannot say is null."""
        found: dict[str, Any] = to_json(asdict(self))
        return found


@dataclass
class Comparison:
    """Several runs side by side, by name; ``settings``: path -> name -> value, of those in which they differ."""

    runs: dict[str, RunFacts]
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values; what JSON cannot say is null."""
        found: dict[str, Any] = to_json(asdict(self))
        return found
