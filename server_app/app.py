"""The Flower ServerApp: hands the grid over to the run. Nothing else."""

from __future__ import annotations

from heterotune_flwr.federation.server import run
from heterotune_flwr.flower import Context, Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what the run configuration's ``config`` and ``overrides`` describe."""
    run(grid, context)
