"""What different models teach each other where answers have several tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.report.sections import load_results, said, section, shown, table

_FAMILIES = {
    "smollm2_gemma": "SmolLM2-135M at 4 bits and Gemma-3-270M at 8 bits",
    "smollm2_pruned": "SmolLM2-135M at 4 bits and its pruned sibling at 16",
}
_PARTITIONS = {
    "tasks": "Every client has tasks of its own",
    "dirichlet": "Dirichlet mixtures of tasks (0.3)",
}


_GUEST = "guest with the bank"


def answers() -> str:
    """The experiment on answers of several tokens; nothing where it was not run."""
    known = load_results("instructions")
    tables = [
        _table(_FAMILIES[suite], clients, partition, rows)
        for name, values in known.items()
        for suite, _, clients in [name.rpartition("_")]
        if suite in _FAMILIES
        for partition, rows in values["partitions"].items()
    ]
    if not tables:
        return ""
    return section(
        "Answers of several tokens",
        said("Named tasks of Natural Instructions, four with one client per type, else eight. An adapter at the last "
        "slot, trained on kept states; nats per answer token over the whole vocabulary, on test texts of all tasks. "
        f"Rates and rounds were chosen on dev texts and a dev seed, {known['trials_per_row']} trials "
        "a row, and two more as long as the best rate was the highest or lowest tried."),
        said("*Pooled data*: the same adapter on everybody's examples, the ceiling. *Bank*: shared by both types "
        "through CMGA, aligned at all answer positions. *Top-8*: token distributions on public answers to prompts of "
        "the clients' own kinds of task, written by the bare smaller model or by people. *Share*: of the gap between "
        "inside the type and pooled data, with a 95 % interval over seeds; a dash where the gap is within noise."),
        *tables,
        said("*What it says.* Where types are aligned decides: at all positions of answers the bank carries much with "
        "one client per type, where answers begin it carries nothing. Wrong maps do harm. With two clients per type "
        "the bank carries little, and predictions add to it; with one they add nothing. Token sums add less than 0.05 "
        "of the gap beside the bank, so they are not built. On clients' own tasks sharing gains nothing."),
        said(f"{_guests(known)} {_written(known)} Not run: {', '.join(known['not_run'])}."),
    )  # fmt: skip


def _guests(known: Mapping[str, Any]) -> str:
    """What a type that never took part has of what the bank gives those who do."""
    told = []
    for values in known.values():
        suite = values if isinstance(values, dict) else {}
        for partition, rows in suite.get("partitions", {}).items():
            for kind, row in rows.get(_GUEST, {}).items():
                bank = rows["bank"][kind]
                share = (bank["bare_all"] - row["loss_all"]) / (bank["bare_all"] - bank["loss_all"])
                told.append(f"{share:.2f} ({partition}, {kind})")
    if not told:
        return ""
    return f"*Guests* who take the bank untrained have, of its gain over the bare model: {', '.join(told)}."


def _written(known: Mapping[str, Any]) -> str:
    """ROUGE-L over the best rival, where answers were written."""
    told = [
        f"{values['rouge_gain_over_best_rival']:+.1f} points ({values['ci_low']:+.1f} .. {values['ci_high']:+.1f}) "
        f"over *{values['best_rival']}*"
        for values in known.values()
        if isinstance(values, dict) and values.get("best_rival")
    ]
    if not told:
        return "Written answers (ROUGE-L) are not measured."
    return f"*Written answers*, ROUGE-L on all tasks: {', '.join(told)}."


def _table(family: str, clients: str, partition: str, rows: Mapping[str, Any]) -> str:
    types = sorted({kind for row in rows.values() for kind in row})
    heads = ("row", *(f"{what}, {kind}" for kind in types for what in ("loss", "share")), "seeds")
    bare = [cell for kind in types for row in [rows["within type"][kind]]
            for cell in (f"{row['bare_all']:.2f}", "-")]  # fmt: skip
    lines = [("bare", *bare, "-")]
    for name, by_type in rows.items():
        cells = [
            cell
            for kind in types
            for cell in ((_loss(by_type[kind]), _share(by_type[kind])) if kind in by_type else "--")
        ]
        lines.append((name, *cells, str(min(row["seeds"] for row in by_type.values()))))
    how = "one client" if clients == "1" else f"{clients} clients"
    return shown(
        f"{_PARTITIONS[partition]}, {family}, {how} per type.", "science.instructions",
        table(heads, lines),
    )  # fmt: skip


def _loss(row: Mapping[str, Any]) -> str:
    return f"{row['loss_all']:.3f}"


def _share(row: Mapping[str, Any]) -> str:
    if "share" not in row:
        return "-"
    return f"{row['share']:.2f} ({row['share_low']:.2f} .. {row['share_high']:.2f})"


SECTIONS = (answers,)
