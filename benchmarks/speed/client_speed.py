"""How fast a client trains with and without kept states.

Seconds per step of 16 texts of the demonstration task on SmolLM2-135M at 4 bits, for the last slot, the upper half of
four slots, and all four, with the states below kept (from the second epoch on) and without; and peak memory of both.
What a warm worker saves is measured by :mod:`.warm_worker`, into the same file.

Run: ``heterotune fetch smollm2; python -m benchmarks.speed.client_speed`` (about 5 minutes on 2 cores).
"""

from __future__ import annotations

from benchmarks.runner import arguments, say, write_results
from benchmarks.speed.memory import measure_step

SLOTS = {"last_slot": "last-1", "upper_half": "upper-half", "all_slots": "all"}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--backbone", default="smollm2", help="another one is measured, not written"
    )
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    values: dict[str, object] = {"runs": args.repeats}
    for name, slots in SLOTS.items():
        common = ["--kind", "heterotune", "--loss", "labels", "--batch", "16", "--slots", slots,
                  "--backbone", args.backbone, "--repeats", str(args.repeats)]  # fmt: skip
        full = measure_step([*common, "--steps", "3"])
        kept = measure_step([*common, "--steps", "12", "--kept"])
        say(name, full, kept)
        values["prefix_cache"] = {f"{name}.full": full, f"{name}.kept": kept}
        values[f"prefix_cache_speedup_{name}"] = round(full["seconds"] / kept["seconds"], 2)
        if args.backbone == "smollm2":
            write_results("client_speed", values)


if __name__ == "__main__":
    main()
