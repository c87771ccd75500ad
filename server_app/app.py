"""The Flower ServerApp: hands the grid over to the run."""

from __future__ import annotations

import time

from heterotune_flwr.experiment import run
from heterotune_flwr.flower import Context, Grid, ServerApp

#: ``flwr run --stream`` stops when the run is over; what was printed last needs time to get there.
LAST_WORDS_SECONDS = 3.0

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what the run configuration's ``config`` and ``overrides`` describe."""
    run(grid, context)
    time.sleep(LAST_WORDS_SECONDS)
