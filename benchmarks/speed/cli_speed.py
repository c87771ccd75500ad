"""How long a user waits for the command itself: help, doctor, a dry run, and the report of a finished run.

Each command is started ``--times`` times as a process of its own, after one that does not count, and the median is
taken. The run that is reported on is made first, the preset ``quick``. Bounds: help 0.5 s, report 3 s, doctor and dry
run 5 s.

Run: ``python -m benchmarks.speed.cli_speed`` (a minute and a half on two quiet cores).
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.runner import arguments, say, write_results

#: Name in the result file -> seconds that are allowed.
BOUNDS = {"help_s": 0.5, "report_s": 3.0, "doctor_s": 5.0, "dry_run_s": 5.0}


def commands(run: Path) -> dict[str, list[str]]:
    """Name in the result file -> words after ``heterotune``; ``run`` is a finished run's directory."""
    return {
        "help_s": ["--help"],
        "report_s": ["report", str(run)],
        "doctor_s": ["doctor"],
        "dry_run_s": ["run", "demo", "--dry-run"],
    }


def seconds(words: list[str]) -> float:
    """Time of one call of the command, from its start to its end."""
    program = Path(sys.executable).parent / "heterotune"
    begin = time.perf_counter()
    subprocess.run([str(program), *words], check=True, capture_output=True)
    return time.perf_counter() - begin


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--times", type=int, default=5)
    args = parser.parse_args()
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        seconds(["run", "quick", "--dir", str(run)])
        for name, words in commands(run).items():
            seconds(words)
            found[name] = round(statistics.median(seconds(words) for _ in range(args.times)), 3)
            say(f"{name} {found[name]:.2f} (at most {BOUNDS[name]:g})")
    write_results("cli", {**found, "bounds": BOUNDS, "times": args.times}, anew=True)


if __name__ == "__main__":
    main()
