"""Prints the Markdown tables of README.md and benchmarks/README.md from ``benchmarks/results``.

Run: ``python -m benchmarks.tables``
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.embedded import CONTROLS

TITLES = {
    "local_only": "alone",
    "within_type": "within type",
    "fedit": "FedIT (LoRA r=16, within type)",
    "bank": "its bank alone",
    "heterotune": "**HeteroTune**",
}


def load(name: str) -> dict[str, Any]:
    """One results file, empty when it was never written."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def accuracy(results: dict[str, Any]) -> str:
    """Rows: clients per type; columns: strategies and HeteroTune's paired gain over within-type."""
    names = [n for n in TITLES if any(n in table for table in results["accuracy"].values())]
    lines = [
        "| clients per type | "
        + " | ".join(TITLES[n] for n in names)
        + " | gain over within type (95 %) |"
    ]
    lines.append("|---" * (len(names) + 2) + "|")
    for clients, table in results["accuracy"].items():
        cells = [f"{table[n]:.1f} ± {table[f'{n}.std']:.1f}" if n in table else "-" for n in names]
        gain = table["gain_over_within_type"]
        cells.append(f"**{gain['gain']:+.1f}** ({gain['low']:+.1f} .. {gain['high']:+.1f})")
        lines.append(f"| {clients} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def personal(results: dict[str, Any]) -> str:
    """The clients' own test sets."""
    names = [n for n in TITLES if any(n in table for table in results["accuracy"].values())]
    lines = ["| clients per type | " + " | ".join(TITLES[n] for n in names) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for clients, table in results["accuracy"].items():
        cells = [f"{table[f'{n}.personal']:.1f}" if n in table else "-" for n in names]
        lines.append(f"| {clients} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bytes_line(results: dict[str, Any]) -> str:
    """One sentence about the wire."""
    up, down = results["wire_bytes_up"], results["wire_bytes_down"]
    lora, model = results["lora16_bytes"], results["model_bytes"]
    return (
        f"{up:,} bytes up and {down:,} down per client-round: {100 * (1 - up / lora):.2f} % fewer than LoRA r=16 "
        f"on all linear layers ({lora:,}), {100 * (1 - up / model):.3f} % fewer than the model in bf16 ({model:,})"
    )


def controls(results: dict[str, Any]) -> str:
    """The bank's gain over within-type with the alignment broken on purpose."""
    lines = [
        "| alignment | clients per type | within type | bank alone | gain (95 %) |",
        "|---|---|---|---|---|",
    ]
    rows: list[tuple[str, str, dict[str, Any]]] = [
        ("as computed", clients, table) for clients, table in results["accuracy"].items()
    ]
    for name in CONTROLS:
        content = results.get(f"control_{name}", {})
        rows += [(name.replace("_", " "), clients, table) for clients, table in content.items()]
    for name, clients, table in rows:
        gain = table.get("bank_gain_over_within_type") or table["gain_over_within_type"]
        bank = table.get("bank", table.get("heterotune"))  # before the bank had a name of its own
        lines.append(
            f"| {name} | {clients} | {table['within_type']:.1f} | {bank:.1f} | "
            f"{gain['gain']:+.1f} ({gain['low']:+.1f} .. {gain['high']:+.1f}) |"
        )
    return "\n".join(lines)


def laboratory(family: dict[str, Any]) -> str:
    """Every row of the laboratory's federated table, each sharing at its own best rate."""
    lines = [
        "| setting | alone | within type | across types | gain over within (s.e.) |",
        "|---" * 5 + "|",
    ]
    for name, row in family["federated"].items():
        gain = f"{row['gain_over_within']:+.1f} ({row['gain_over_within_se']:.1f})"
        lines.append(
            f"| {name} | {row['alone']:.1f} | {row['within']:.1f} | {row['across']:.1f} | {gain} |"
        )
    return "\n".join(lines)


def read_outs(family: dict[str, Any]) -> str:
    """Read-out accuracy against the anchors."""
    keys = ("held_out_correlation", "within", "across", "own_300", "own_300_other_300", "own_600")
    lines = [
        "| anchors | " + " | ".join(key.replace("_", " ") for key in keys) + " |",
        "|---" * 7 + "|",
    ]
    for name, row in family["readout"].items():
        lines.append(f"| {name} | " + " | ".join(str(row[key]) for key in keys) + " |")
    return "\n".join(lines)


def losses(results: dict[str, Any]) -> str:
    """Every client before and after HeteroTune's first seed."""
    lines = ["| client | loss before | after | accuracy before | after |", "|---" * 5 + "|"]
    for row in results.get("clients", []):
        cells = [f"{row['global_loss_before']:.2f}", f"{row['global_loss_after']:.2f}",
                 f"{100 * row['global_accuracy_before']:.1f}", f"{100 * row['global_accuracy_after']:.1f}"]  # fmt: skip
        lines.append(f"| {row['client']} ({row['type']}) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    for name in ("real_backbones", "embedded"):
        if results := load(name):
            print(f"## {name}\n\n{accuracy(results)}\n\n{bytes_line(results)}\n")
            print(f"own tests:\n\n{personal(results)}\n\n{controls(results)}\n")
            print(losses(results))
    for name, family in load("alignment_probe").items():
        if isinstance(family, dict) and "federated" in family:
            print(f"## laboratory, {name}\n\n{laboratory(family)}\n")
            if "readout" in family:
                print(read_outs(family) + "\n")


if __name__ == "__main__":
    main()
