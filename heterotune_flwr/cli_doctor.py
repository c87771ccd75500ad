"""``heterotune doctor``: what of this machine stands in a run's way."""

from __future__ import annotations

from typing import Annotated

import typer


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Look whether this machine will do: versions, GPU, memory, disk, folders, ports, what the cache holds.

    Each line is ok, a warning, or a fault with its mend; exit code 1 if there is a fault. Nothing is started or
    changed. A deployed node is checked further by: heterotune node check
    """
    from heterotune_flwr.deploy.findings import ready, render, to_json
    from heterotune_flwr.doctor import examine

    findings = examine()
    verdicts = "nothing is in the way: heterotune run demo", "something is in the way"
    typer.echo(to_json(findings) if as_json else render(findings, *verdicts))
    if not ready(findings):
        raise typer.Exit(1)
