"""The door of the ``heterotune`` command: Ctrl-C is minded before anything that takes time is imported."""

from __future__ import annotations

import sys


def main() -> None:
    """Import the command and run it."""
    try:
        from heterotune_flwr.cli import main as command
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    command()


if __name__ == "__main__":
    main()
