"""The summary in sentences, and the five words the rest of the page uses."""

from __future__ import annotations

import statistics

from heterotune_flwr.names import safe_text
from heterotune_flwr.report.blocks import (
    Block,
    Figure,
    Figures,
    Prose,
    Section,
    Terms,
    listed,
    plural,
)
from heterotune_flwr.report.charts.kinds import told
from heterotune_flwr.report.facts import RunFacts
from heterotune_flwr.report.identity import on_a_page
from heterotune_flwr.report.measured import ALONE, BARE, FEDERATED
from heterotune_flwr.report.picks import (
    MODEL_NAMES,
    Lead,
    Row,
    compared,
    gain,
    lead,
    left_as,
    origin_of,
    outcomes,
)
from heterotune_flwr.report.sections.state import (
    NAMED,
    state_sentence,
    state_tone,
    trouble_sentence,
)

_WORDS = (
    (
        "Type",
        "One language model at one precision, such as a small model at 4 bits. Every client has one. "
        "Clients of different types cannot average their weights.",
        "",
    ),
    (
        "Slot",
        "A place in a model where something small is added. The model itself stays as it is.",
        "",
    ),
    (
        "Bank",
        "The small weights in a slot that are trained and travel. They have the same shape for every type.",
        "",
    ),
    (
        "Own test",
        "Examples of a client that nobody trained on: how a model does on that client's kind of data. "
        "The common test is the same for all.",
        "",
    ),
    (
        "Taken home",
        "At the end a client keeps the best of three models, judged by examples it set aside: untouched, "
        "trained alone, federated.",
        "",
    ),
)


def summary(facts: RunFacts) -> Section:
    """What happened, who gained, who lost, how the run stands."""
    main = lead(facts)
    blocks: list[Block] = [
        Prose(state_sentence(facts), "answer-state", f"told {state_tone(facts)}")
    ]
    if figures := _figures(facts, main):
        blocks.append(Figures(figures))
    told_of = [
        ("Run", _happened(facts), "what-happened"),
        ("Result", _results(facts, main), "answer-results"),
        ("Gained", _gained(facts, main), "answer-gained"),
        ("Lost", _lost(facts, main), "answer-lost"),
        ("Taken home", _took(facts, main), "answer-took"),
        ("Out", _out(facts), "answer-out"),
        ("Travelled", _travelled(facts), "answer-bytes"),
        ("Resumed", _resumed(facts), "answer-resumed"),
        ("Settings", _defaults(facts), "answer-defaults"),
        ("Went wrong", trouble_sentence(facts), "answer-trouble"),
    ]
    blocks.append(Terms([term for term in told_of if term[1]]))
    return Section(
        "summary",
        "Summary",
        "Read this first: every sentence is shown in full further down.",
        blocks,
    )


def _happened(facts: RunFacts) -> str:
    run = facts.identity
    types = len({one.type_key for one in facts.types})
    strategies = [one.title for one in {one.strategy: one for one in facts.runs}.values()]
    who = plural(run.clients, "client") + (f" of {plural(types, 'model type')}" if types else "")
    rounds = f", {plural(run.rounds, 'round')} each" if run.rounds else ""
    seeds = f" with {plural(len(run.seeds), 'seed')}" if len(run.seeds) > 1 else ""
    where = {True: " in a simulation on one machine", False: " on machines of their own"}
    place = "" if run.simulated is None else where[run.simulated]
    text = f"{who} learned{place}{seeds}{rounds}." if not strategies else (
        f"{who} took part{place}. They went through {listed(strategies, 8)}{rounds}{seeds}."
    )  # fmt: skip
    return f"{text} Data: {safe_text(run.data).rstrip('.')}." if run.data else text


def _figures(facts: RunFacts, main: Lead) -> list[Figure]:
    """One number a kind of model; the best one stands out, if it is better than all others."""
    kinds = _glance(facts, main)
    values = {kind: row.mean(main.scope, main.measure) or 0.0 for kind, row in kinds.items()}
    best = _best(values, main)
    return [
        Figure(
            told(values[kind], main.unit),
            "alone" if kind == ALONE else row.title,
            main.name,
            "lead" if best == [kind] else "",
        )
        for kind, row in kinds.items()
    ]


def _glance(facts: RunFacts, main: Lead) -> dict[str, Row]:
    """Every kind of model with its row; of federated ones the subject's."""
    return {
        row.kind: row
        for row in compared(facts, main)
        if row.kind != FEDERATED or row.strategy == main.strategy
    }


def _best(values: dict[str, float], main: Lead) -> list[str]:
    """The kinds of models with the best number."""
    top = (min if main.measure == "loss" else max)(values.values(), default=None)
    return [kind for kind, value in values.items() if value == top]


def _results(facts: RunFacts, main: Lead) -> str:
    kinds = _glance(facts, main)
    means = {kind: row.mean(main.scope, main.measure) or 0.0 for kind, row in kinds.items()}
    kind = next((run.kind for run in facts.runs if run.strategy == main.strategy), FEDERATED)
    if kind not in means and BARE in means:
        bare = f"untouched models reach {told(means[BARE], main.unit)} ({main.name}, mean over clients)"
        return f"No test of {main.title} after a round was answered yet; {bare}."
    if kind not in means:
        return "" if facts.runs else "Nothing was measured."
    ours = means.pop(kind)
    others = [
        f"{MODEL_NAMES.get(kind, kind.replace('_', ' '))} {told(value, main.unit)}"
        for kind, value in means.items()
    ]
    beside = f"; beside it: {', '.join(others)}" if others else ""
    better = [kind for kind in _best({**means, FEDERATED: ours}, main) if kind in means]
    worse = ""
    if better and means[better[0]] != ours:
        behind = gain(abs(means[better[0]] - ours), main.measure).lstrip("+")
        name = MODEL_NAMES.get(better[0], better[0].replace("_", " "))
        worse = f" That is worse than {name}, by {behind} {main.points}"
        lost = ALONE in means and _best({ALONE: means[ALONE], FEDERATED: ours}, main) == [ALONE]
        worse += ": sharing did not pay here." if lost or better[0] in (ALONE, BARE) else "."
    return f"{main.title} reaches {told(ours, main.unit)} ({main.name}, mean over clients){beside}.{worse}"


def _gains(facts: RunFacts, main: Lead, over: str) -> dict[str, float]:
    """Every client's gain by its federated model over the untouched or the lone one, mean over seeds."""
    gains: dict[str, list[float]] = {}
    for one in outcomes(facts, main.strategy):
        value = getattr(one.gains, f"federated_over_{over}", None)
        if value is not None:
            gains.setdefault(one.client_id, []).append(value)
    return {client: statistics.fmean(values) for client, values in gains.items()}


def _named(gains: dict[str, float], main: Lead, best: bool) -> str:
    order = sorted(gains, key=lambda client: (-gains[client] if best else gains[client], client))
    names = [f"{client} ({gain(gains[client], main.measure)})" for client in order]
    return listed(names, NAMED)


def _gained(facts: RunFacts, main: Lead) -> str:
    told_of = []
    for over, name in ((BARE, "the untouched model"), (ALONE, "training alone")):
        if gains := _gains(facts, main, over):
            up = {client: value for client, value in gains.items() if value > 0}
            mean = gain(statistics.fmean(gains.values()), main.measure)
            most = f"; most {_named(up, main, best=True)}" if up else ""
            who = f"{len(up)} of {plural(len(gains), 'client')}"
            told_of.append(f"Over {name}: {who}, on average over all {mean} {main.points}{most}.")
    return " ".join(told_of) or "It cannot be told: no client has both models measured."


def _lost(facts: RunFacts, main: Lead) -> str:
    told_of = []
    for over, name in ((ALONE, "training alone"), (BARE, "the untouched model")):
        if gains := _gains(facts, main, over):
            down = {client: value for client, value in gains.items() if value < 0}
            who = (
                f"{plural(len(down), 'client')}: {_named(down, main, best=False)}"
                if down
                else "nobody"
            )
            told_of.append(f"Against {name}, {who}.")
    return " ".join(told_of)


def _took(facts: RunFacts, main: Lead) -> str:
    taken = [one.took for one in outcomes(facts, main.strategy) if one.took]
    if not taken:
        return ""
    counts = {model: taken.count(model) for model in (FEDERATED, ALONE, BARE)}
    kept = {MODEL_NAMES[model]: count for model, count in counts.items() if count}
    seeds = ", counted once a seed," if len(facts.identity.seeds) > 1 else ""
    who = f"{plural(len(taken), 'client')}{seeds}"
    if len(kept) == 1:
        return f"All of {who} took the {next(iter(kept))} model."
    return (
        f"Of {who} {listed([f'{count} took the {model} model' for model, count in kept.items()])}."
    )


def _out(facts: RunFacts) -> str:
    out = [client for client in facts.clients if client.state != "in"]
    if not out:
        return "Nobody: every client was in to the end." if facts.clients else ""
    names = [
        f"{client.client_id} ({on_a_page(client.why) or client.state.replace('_', ' ')})"
        for client in out
    ]
    return f"{listed(names, NAMED)}."


def _travelled(facts: RunFacts) -> str:
    main = [
        one for one in facts.traffic if one.strategy == facts.identity.subject
    ] or facts.traffic[-1:]
    if not main:
        return ""
    one = main[0]
    each = ""
    if one.up_each is not None and one.down_each is not None:
        each = f"; a client and round {told(one.up_each, 'bytes')} up, {told(one.down_each, 'bytes')} down"
    ways = [
        f"{told(up or 0, 'bytes')} up, {told(down or 0, 'bytes')} down"
        for up, down in (
            (one.evaluate_up, one.evaluate_down),
            (one.one_time_up, one.one_time_down),
        )
    ]
    return (
        f"In training {told(one.train_up, 'bytes')} up to the server, {told(one.train_down, 'bytes')} down "
        f"to clients{each}. Tests: {ways[0]}. Once per run: {ways[1]}."
    )


def _resumed(facts: RunFacts) -> str:
    run = facts.identity
    hint = ""
    if run.state in ("interrupted", "failed") and any(one.rounds_done for one in facts.runs):
        command = "deploy run DEPLOYMENT" if run.simulated is False else "run"
        hint = f" It goes on by heterotune {command} --resume DIR, with its run directory for DIR."
    if not run.resumed:
        return "Never: it ran in one go." if run.state == "finished" else f"Never.{hint}"
    after = []
    for one in facts.runs:
        if one.resumed_after:
            name = f"{one.title}, seed {one.seed}," if len(run.seeds) > 1 else one.title
            after.append(f"{name} after round {listed(list(map(str, one.resumed_after)))}")
    over = [one.strategy for one in facts.happenings if one.kind == "already_finished"]
    after += [f"{one.title} had finished" for one in facts.runs if one.strategy in over]
    where = f": {listed(after)}" if after else ", from the beginning"
    return f"{'Once' if run.resumed == 1 else f'{run.resumed} times'}{where}.{hint}"


def _defaults(facts: RunFacts) -> str:
    origins = [origin_of(setting) for setting in facts.settings]
    if not origins or set(origins) == {"unknown"}:
        return ""
    mine, preset, default = (origins.count(name) for name in ("user", "preset", "default"))
    return (
        f"{mine} chosen for this run, {preset} taken from {left_as(facts.preset)}, "
        f"{default} left at the program's default."
    )


def words(facts: RunFacts) -> Section:
    """Five words."""
    return Section(
        "words",
        "Five words",
        "The rest of the page uses these words in this sense.",
        [Terms(_WORDS)],
    )
