"""Does mixing bit widths cost anything? 4-, 8- and 16-bit clients in one federation against all at one width.

The embedded family through Flower, 2 clients per type, every strategy at its own best learning rate, paired over
clients. ``mixed`` is the presets' federation: tiny-a at 16, tiny-b at 8, tiny-c at 4 bits. What a backbone loses by its
own quantization shows in ``alone`` of the same type; what mixing adds is the gain over it, compared between rows.

Run: ``python -m benchmarks.quantization_bias`` (about 8 minutes on 2 cores).
Writes ``benchmarks/results/quantization_bias.json``.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.common import (
    SEEDS,
    client_accuracies,
    flower_run,
    mean_and_std,
    paired_gain,
    seed_means,
    tuned_rates,
    write_results,
)
from benchmarks.embedded import overrides

FEDERATIONS = {
    "mixed": ("bf16", "int8", "nf4"),
    "all_bf16": ("bf16", "bf16", "bf16"),
    "all_int8": ("int8", "int8", "int8"),
    "all_nf4": ("nf4", "nf4", "nf4"),
}
CLIENTS = 2


def federation_row(bits: tuple[str, ...], seeds: list[int]) -> dict[str, Any]:
    """Accuracies of one federation, overall and per backbone, and the paired gains of the bank alone."""
    words = [f"types.{index}.bits={width}" for index, width in enumerate(bits)]
    rates = tuned_rates("tiny", 3, CLIENTS)
    rates.pop("heterotune", None)  # the bank alone is what mixed bits could harm
    results = flower_run("demo", [*overrides(CLIENTS, seeds, rates), *words])
    row: dict[str, Any] = {}
    found = {name: client_accuracies(results, name) for name in rates}
    for name, values in found.items():
        row[name], row[f"{name}.std"] = mean_and_std(seed_means(values))
        for backbone in ("tiny-a", "tiny-b", "tiny-c"):
            own = {key: value for key, value in values.items() if key[1].startswith(backbone)}
            row[f"{name}.{backbone}"] = mean_and_std(seed_means(own))[0]
    row["gain_over_within_type"] = paired_gain(found["bank"], found["within_type"])
    row["gain_over_local_only"] = paired_gain(found["bank"], found["local_only"])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    args = parser.parse_args()
    values: dict[str, Any] = {"seeds": args.seeds, "clients_per_type": CLIENTS}
    for name, bits in FEDERATIONS.items():
        values[name] = federation_row(bits, args.seeds)
        print(name, values[name], flush=True)
        write_results("quantization_bias", values)


if __name__ == "__main__":
    main()
