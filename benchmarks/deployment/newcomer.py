"""From a fresh clone to a chat with an exported model of own data, by the README's own commands, with a clock.

Writes reviews.csv, data that nobody has seen, and runs what stands below the README's heading "From your own file to a
chat", line by line, with an empty cache. Minutes on two cores; the package index is needed unless a set-up environment
is given.

    python -m benchmarks.deployment.newcomer
"""

from __future__ import annotations

import csv
import itertools
import os
import random
import re
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.runner import ROOT, arguments, say, write_results

HEADING = "## From your own file to a chat"
#: The README's way to an environment.
SETUP = "make setup && source .venv/bin/activate"
_SHOPS = {
    "north": ("leek soup", "rye bread", "smoked fish"),
    "south": ("tomato soup", "olive bread", "grilled fish"),
    "east": ("noodle soup", "dumplings", "fried rice"),
    "west": ("bean soup", "corn bread", "roast chicken"),
}
_WORDS = {
    "good": (
        "was warm and fresh",
        "tasted wonderful",
        "came at once",
        "made my day",
        "is worth the way",
    ),
    "bad": (
        "was cold and stale",
        "tasted of nothing",
        "came an hour late",
        "made me ill",
        "is a waste of money",
    ),
    "fair": (
        "was neither hot nor cold",
        "tasted as usual",
        "came in the end",
        "filled me",
        "is what one pays for",
    ),
}
_WHEN = ("today", "on Monday", "for lunch", "again", "at last", "with friends")


def commands(readme: str) -> list[str]:
    """The lines of code below the heading."""
    part = readme.partition(HEADING)[2].partition("\n## ")[0]
    return [line.strip() for line in re.findall(r"^    (\S.*)$", part, flags=re.M)]


def write_reviews(path: Path, rows: int = 320) -> None:
    """Invented reviews of four shops that sell different things."""
    rng = random.Random(0)
    every = [
        (f"the {food} {words} {when}", mood, shop)
        for shop, foods in _SHOPS.items()
        for food, (mood, said), when in itertools.product(foods, _WORDS.items(), _WHEN)
        for words in said
    ]
    with path.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["review", "mood", "shop"])
        table.writerows(rng.sample(every, rows))


def walk(folder: Path, venv: Path | None = None) -> dict[str, float]:
    """Clone, write the data, run every command; seconds by command.

    Parameters
    ----------
    folder
        Empty; everything is made in it, the cache too.
    venv
        An environment with what the package needs, in the place of the README's first command.

    Raises
    ------
    subprocess.CalledProcessError
        A command fails.
    RuntimeError
        The chat says nothing.

    """
    clone = folder / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    write_reviews(clone / "reviews.csv")
    environment = {**os.environ, "HETEROTUNE_CACHE": str(folder / "cache")}
    environment.pop("PYTHONPATH", None)
    if venv is not None:
        environment["PYTHONPATH"] = str(clone)  # the environment's packages, the clone's code
    programs = (venv or clone / ".venv") / "bin"
    environment["PATH"] = f"{programs}{os.pathsep}{environment['PATH']}"
    seconds: dict[str, float] = {}
    found = commands((clone / "README.md").read_text())
    if found[:1] != [SETUP] or "heterotune chat" not in found[-1]:
        raise RuntimeError(f"the README's commands are not those of this script: {found}")
    for line in found:
        begin = time.monotonic()
        here = "true" if line == SETUP and venv is not None else line
        done = subprocess.run(
            ["bash", "-c", here],
            cwd=clone,
            env=environment,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        seconds[line] = round(time.monotonic() - begin, 1)
        say(f"{seconds[line]:8.1f} s  {line}")
    if not done.stdout.strip():
        raise RuntimeError("the model has no answer")
    say(done.stdout.strip())
    return seconds


def main() -> None:
    """Walk and write the minutes."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--venv", type=Path, help="a set-up environment in the place of `make setup`"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="heterotune-newcomer-") as folder:
        seconds = walk(Path(folder), given.venv and given.venv.resolve())
    values = {
        "minutes": round(sum(seconds.values()) / 60, 2),
        "set_up": "README" if given.venv is None else "given",
        "seconds": seconds,
    }
    write_results("newcomer", values, anew=True)


if __name__ == "__main__":
    main()
