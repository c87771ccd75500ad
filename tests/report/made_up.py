"""A run's facts with something in every section, and names that a hostile client would choose."""

from __future__ import annotations

import math

from heterotune_flwr.report.facts import (
    Agreement,
    Alignment,
    ChannelFacts,
    ClientFacts,
    Happening,
    Identity,
    Phase,
    Protection,
    RunFacts,
    SettingFact,
    Start,
    StrategyRun,
    Traffic,
    TypeFacts,
)
from heterotune_flwr.report.measured import (
    ALL_TYPES,
    ClientOutcome,
    Confusion,
    Curve,
    Gains,
    SampledAnswer,
    SideBySide,
    Spread,
    TypeOutcome,
)

TYPES = ("tiny-a@bf16", "tiny-b@int8", "tiny-c@nf4")
STRATEGIES = (("local_only", "local only", "alone"), ("within_type", "within type", "within_type"),
              ("heterotune", "HeteroTune", "federated"))  # fmt: skip
LABELS = (
    "admin",
    "comm",
    "database",
    "devel",
    "doc",
    "editors",
    "games",
    "gnome",
    "graphics",
    "kernel",
    "libs",
    "mail",
    "math",
    "net",
    "sound",
    "web",
)
HOSTILE = "<script>alert('x')</script>\"'&\x1b[31m\u202e" + "long" * 200


def wave(*parts: float) -> float:
    """A number from 0 to 1 that looks arbitrary and is the same every time."""
    return (
        math.sin(sum((place + 1.7) * part for place, part in enumerate(parts, 1)) * 12.9898) + 1
    ) / 2


def full(
    clients: int = 12, labels: tuple[str, ...] = LABELS, rounds: int = 30, hostile: bool = False
) -> RunFacts:
    """A finished run of three types and three strategies; ``hostile``: whatever a client may name is an attack."""
    bad = HOSTILE if hostile else ""
    names = [f"client-{number:04d}{bad}" for number in range(clients)]
    type_of = {name: TYPES[number % 3] + bad for number, name in enumerate(names)}
    labels = tuple(label + bad for label in labels)
    facts = RunFacts(
        Identity("demo" + bad, "runs/demo", "finished", created=1.796e9, last_event=1.7960001e9, simulated=True,
                 versions={"heterotune-flwr": "0.1.0", "flwr" + bad: "1.42"},
                 seeds=[0], strategies=[s for s, _, _ in STRATEGIES],
                 subject="heterotune", rounds=rounds, clients=clients, tested=clients, task="labels",
                 labels=list(labels), data="debian_sections, divided by dirichlet 0.3" + bad, resumed=1,
                 starts=[Start(1.796e9), Start(1.79600005e9, resumed=True, torn_line=True)])
    )  # fmt: skip
    for place, (strategy, title, kind) in enumerate(STRATEGIES):
        facts.runs.append(StrategyRun(strategy, title, 0, kind, "finished", rounds, rounds, 30.0 + place, 1299.0,
                                      [7], [5], rounds // 2 + 1, clients, "accuracy", "personal"))  # fmt: skip
        facts.traffic.append(Traffic(strategy, 0, 12_470_697 * place, 13_212_132 * place, 19_157, 1_765_080, 9_819_453,
                                     1_867_350, 12_608_270 * place, 16_962_060 * place, rounds * clients,
                                     34_640.8 * place, 36_700.4 * place, 703_146.7, 7_361_749.3))  # fmt: skip
        facts.phases += [
            Phase("training", strategy, 0, 20.0 + place, 40.0),
            Phase("testing", strategy, 0, 9.0 + place),
        ]
        for key in (ALL_TYPES, *sorted(set(type_of.values()))):
            for measure in ("personal_accuracy", "train_loss", "global_accuracy"):
                facts.curves.append(_curve(strategy, measure, key, place, rounds))
    facts.phases[:0] = [Phase("asking", "", 0, 2.0), Phase("aligning", "", 0, 11.5)]
    facts.types = [
        TypeFacts(
            key,
            key,
            "nf4",
            clients // 3,
            apart="its models saw other words" + bad if not place else "",
        )
        for place, key in enumerate(sorted(set(type_of.values())))
    ]
    for number, name in enumerate(names):
        _add_client(facts, name, type_of[name], number, labels, bad)
    _add_means(facts, sorted(set(type_of.values())), clients)
    _add_labels(facts, labels, sorted(set(type_of.values())))
    _add_course(facts, sorted(set(type_of.values())), rounds, bad)
    _add_trust(facts, names, bad)
    return facts


def _curve(strategy: str, measure: str, key: str, place: int, rounds: int) -> Curve:
    steps = list(range(0, rounds + 1, 5))
    values = [
        0.2
        + 0.1 * place * step / rounds
        + 0.15 * step / rounds
        + 0.02 * wave(step, place, len(key))
        for step in steps
    ]
    moved: list[int | None] = [850_000 * place * step for step in steps]
    return Curve(strategy, 0, measure, key, steps, values, moved)


def _add_client(
    facts: RunFacts, name: str, key: str, number: int, labels: tuple[str, ...], bad: str
) -> None:
    lost = number == 3
    held = {
        label: 1 + int(60 * wave(number, place) ** 4)
        for place, label in enumerate(labels)
        if (number + place) % 3
    }
    facts.clients.append(ClientFacts(
        name, key, state="cooldown" if lost else "in", why="out of memory" + bad if lost else "", examples=96,
        label_mix=held, peak_memory_mb=1200.0 + 10 * number, answers=30, failures=3 * lost))  # fmt: skip
    bare, alone = 0.1 + 0.1 * wave(number), 0.42 + 0.12 * wave(number, 2)
    federated = alone + 0.16 * wave(number, 3) - 0.04
    models = {"bare": bare, "alone": alone, "federated": federated, "taken": federated}
    facts.client_outcomes.append(ClientOutcome(
        name, key, "heterotune", 0, "federated" if federated > alone else "alone", 20,
        {model: {"personal": {"accuracy": value, "loss": 3 - value}} for model, value in models.items()},
        Gains("accuracy", "personal", federated - bare, federated - alone),
        choosing_loss={model: 3 - value for model, value in models.items() if model != "taken"},
        own_rounds=2))  # fmt: skip


def _add_means(facts: RunFacts, types: list[str], clients: int) -> None:
    rows = [("bare", "untouched", "heterotune", 0.13), ("majority", "majority", "heterotune", 0.21),
            ("alone", "alone", "heterotune", 0.495), ("within_type", "within type", "within_type", 0.52),
            ("federated", "HeteroTune", "heterotune", 0.565)]  # fmt: skip
    for key in (ALL_TYPES, *types):
        for kind, title, strategy, value in rows:
            for scope, less in (("personal", 0.0), ("global", 0.09)):
                spread = Spread(value - less, 0.07, value - 0.15, value - 0.12, clients)
                scores = {"accuracy": spread, "macro_f1": Spread(value - 0.1)}
                facts.side_by_side.append(SideBySide(kind, title, strategy, 0, scope, key, scores))
    for key in types:
        before = {"personal": {"accuracy": Spread(0.2, 0.05, 0.1, 0.1, 4)}}
        after = {"personal": {"accuracy": Spread(0.55, 0.05, 0.4, 0.42, 4)}}
        facts.type_outcomes.append(TypeOutcome(key, "heterotune", 0, 4, before, after, {"federated": 4},
                                               Gains("accuracy", "personal", 0.35, -0.012)))  # fmt: skip


def _add_labels(facts: RunFacts, labels: tuple[str, ...], types: list[str]) -> None:
    for model, sure in (("bare", 0.1), ("alone", 0.5), ("federated", 0.6)):
        for key in (ALL_TYPES, *types):
            counts = [
                [
                    int(30 * (sure if row == column else 0.2 * wave(row, column)))
                    for column in range(len(labels))
                ]
                for row in range(len(labels))
            ]
            facts.confusions.append(Confusion("heterotune", 0, model, "personal", key, list(labels), counts,
                                              sum(map(sum, counts)), sure, sure - 0.1,
                                              {label: wave(place) for place, label in enumerate(labels)}))  # fmt: skip


def _add_course(facts: RunFacts, types: list[str], rounds: int, bad: str) -> None:
    for key in types:
        for place, quality in (("slot 0", 0.45), ("view text", 0.78)):
            facts.alignment.append(Alignment(0, key, place, quality, 0.3, quality > 0.4, False))
    half = list(range(1, rounds // 2 + 1))
    pairs = [f"{a}|{b}" for place, a in enumerate(types) for b in types[place + 1 :]]
    facts.agreement.append(Agreement(
        "heterotune", 0, "slot 0", half,
        {pair: [0.5 * wave(place, step) - 0.1 for step in half] for place, pair in enumerate(pairs)},
        {key: [0.7 + 0.1 * wave(place, step) for step in half] for place, key in enumerate(types)},
        conflict_rate=[wave(step) / 3 for step in half]))  # fmt: skip
    facts.channels.append(
        ChannelFacts(
            "heterotune", 0, "statistics", numbers={"clients": 12.0}, notes=["agree" + bad]
        )
    )


def _add_trust(facts: RunFacts, names: list[str], bad: str) -> None:
    who = names[3]
    facts.happenings = [
        Happening("client_failed", f"{who} failed in its training: out of memory", 1.796e9, "heterotune", 0, 4, who,
                  "out of memory" + bad, 3),
        Happening("cooldown", f"{who} failed too often and was not asked", 1.796e9, "heterotune", 0, 6, who),
        Happening("refused", f"an update of {names[1]} was refused", 1.796e9, "heterotune", 0, 8, names[1],
                  undone=True),
        Happening("skipped", "round 7 was skipped: 1 usable updates, 2 needed", 1.796e9, "heterotune", 0, 7),
        Happening("channel_note", "statistics: told by 12 clients" + bad, 1.796e9, "heterotune", 0, 1),
        Happening("resumed", "the run was resumed after round 5", 1.796e9, "heterotune", 0, 5),
    ]  # fmt: skip
    facts.preset = "demo"
    facts.settings = [
        SettingFact("server.rounds", 30, 10, "user", "rounds of a strategy"),
        SettingFact(
            "train.learning_rate", 0.004, 0.001, "preset", "rate of the clients' optimizer"
        ),
        SettingFact("method.latent", 128, 128, "default", "width of the latents"),
    ]
    facts.protections = [
        Protection(
            "update gate",
            "the shared model from single clients",
            True,
            "Updates of a wrong form are refused.",
        ),
        Protection("encrypted link", "messages from the network", False, "This was a simulation."),
        Protection(
            "floors", "a node's examples from the server", None, "Each node's owner sets floors."
        ),
    ]
    facts.trouble = ["status.json is missing" + bad]
    facts.untold = ["2 clients have not told a label mix"]


def text_run() -> RunFacts:
    """A run whose answers are text: no labels, sampled answers instead."""
    facts = full()
    facts.identity.task, facts.identity.labels = "text", []
    facts.confusions = []
    for client in facts.clients:
        client.label_mix = None
    facts.answers = [
        SampledAnswer("client-0001", TYPES[1], "heterotune", 0, "What is a kernel?\nAnswer shortly.", "The core.",
                      {"bare": "is is is", "alone": "A part of it " * 40, "federated": "The core."})
    ]  # fmt: skip
    return facts


def begun(name: str = "begun") -> RunFacts:
    """A run that has only begun: nothing was measured, nothing has travelled."""
    return RunFacts(Identity(name, "runs/begun", "interrupted", "killed", resumed=0))
