"""Prints the Markdown tables of README.md and benchmarks/README.md from ``benchmarks/results``.

Run: ``python -m benchmarks.tables``
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.common import RESULTS

TITLES = {
    "local_only": "alone",
    "within_type": "within type",
    "fedit": "FedIT (LoRA r=16, within type)",
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
    """HeteroTune's gain over within-type with the alignment broken on purpose."""
    lines = [
        "| alignment | clients per type | within type | HeteroTune | gain (95 %) |",
        "|---|---|---|---|---|",
    ]
    rows: list[tuple[str, str, dict[str, Any]]] = [
        ("as computed", clients, table) for clients, table in results["accuracy"].items()
    ]
    for name in ("random_maps", "rotated_basis"):
        content = results.get(f"control_{name}", {})
        nested = content if "within_type" not in content else {"2": content}
        rows += [(name.replace("_", " "), clients, table) for clients, table in nested.items()]
    for name, clients, table in rows:
        gain = table["gain_over_within_type"]
        lines.append(
            f"| {name} | {clients} | {table['within_type']:.1f} | {table['heterotune']:.1f} | "
            f"{gain['gain']:+.1f} ({gain['low']:+.1f} .. {gain['high']:+.1f}) |"
        )
    return "\n".join(lines)


def main() -> None:
    for name in ("real_backbones", "embedded"):
        if results := load(name):
            print(f"## {name}\n\n{accuracy(results)}\n\n{bytes_line(results)}\n")
            print(f"own tests:\n\n{personal(results)}\n\n{controls(results)}\n")


if __name__ == "__main__":
    main()
