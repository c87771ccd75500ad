"""What becomes of a client that mixes its own expert with the shared one, instead of choosing between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.report.sections import (
    load_results,
    number,
    said,
    section,
    shown,
    table,
    told_gain,
)

_ROWS = {
    "bare": "bare",
    "alone": "alone",
    "stopped": "alone, stopped in time",
    "federated": "federated",
    "continued": "federated, then own rounds",
    "switch": "switch",
    "gate_alone": "gate, private and bare",
    "gate": "gate over all three",
    "gate_by_input": "gate by input",
    "mixed": "switch, mixture to one",
    "gated": "switch, gate",
    "kept": "switch, then own rounds",
}


def mixture() -> str:
    """The gate over reach against the switch."""
    known = load_results("reach")
    cases = [name for name in known if isinstance(known[name], dict) and name != "all"]
    seeds, missing = ", ".join(map(str, known["seeds"])), ", ".join(known["missing"])
    counts = ", ".join(f"{case} {known[case]['clients']}" for case in cases)
    left = f" Not measured: {missing}." if missing else ""
    return section(
        "The mixture over reach",
        said(f"The clients of the section above, embedded family, seeds {seeds}; clients: {counts}.{left} A client "
        "has its private expert (the model trained alone), the federated one, and its bare model. Everything is "
        "fitted or chosen on its choosing set, and measured on its own test (at most 50 generated answers) and on "
        "the common test of all clients' tasks."),
        said("*Switch*: one of the three, by the rule as it was before own rounds. *Gate*: weights of the two experts, "
        "the rest for the bare model, by the loss; of labels two more numbers, how much of the class statistics and "
        "of the label frequencies acts. *By input*: weights that depend on how far each expert moves a state. *Switch, "
        "mixture to one* and *switch, gate*: in the federated one's place in the switch stands the mixture whose "
        "weights sum to one, or the gate, judged on each fifth of the choosing set by weights fitted on the rest. "
        "*Stopped in time*: after as many rounds as are best, of 1 to 7. *Then own rounds*: none, one or two, as is "
        "best; *switch, then own rounds* has that model in the federated one's place, as the choice now has it."),
        shown(
            "Gain over the switch on own tests, paired by client: less loss, and points of accuracy (sentiment) or "
            "ROUGE-L. Worse: clients that are surely worse than bare / alone (Holm, 5 %), in loss or score. All "
            "cases.", "science.reach",
            table(("row", "loss", "score", "gain in loss", "gain in score", "worse"),
                  [(title, number(row, "loss", 2), number(row, "score"), _gain(row, "loss", 2), _gain(row, "score", 1),
                    f"{len(row['worse_than_bare'])} / {len(row['worse_than_alone'])}")
                   for name, title in _ROWS.items() for row in [known["all"]["own"][name]]]),
        ),
        shown(
            "Own tests case by case: loss / score.", "science.reach",
            table(("row", *cases), [(title, *(_both(known[case]["own"][name]) for case in cases))
                                    for name, title in _ROWS.items()]),
        ),
        shown(
            "The same on the common test of all tasks.", "science.reach",
            table(("row", *cases), [(title, *(_both(known[case]["all"][name]) for case in cases))
                                    for name, title in _ROWS.items()]),
        ),
        said(f"Mean weights of the gate over all three: {_weights(known)}."),
    )  # fmt: skip


def _gain(row: Mapping[str, Any], measure: str, digits: int) -> str:
    gain = row.get(f"{measure}_gain")
    if gain is None:
        return "-"
    if digits == 1:
        return told_gain(gain)
    return f"{gain['gain']:+.2f} ({gain['low']:+.2f} .. {gain['high']:+.2f})"


def _both(row: Mapping[str, Any]) -> str:
    return f"{row['loss']:.2f} / {row['score']:.1f}"


def _weights(known: Mapping[str, Any]) -> str:
    private, shared = known["all"]["own"]["gate"]["weights"]
    return f"private {private:.2f}, federated {shared:.2f}, bare {1 - private - shared:.2f}"


SECTIONS = (mixture,)
