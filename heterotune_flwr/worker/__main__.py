"""``python -m heterotune_flwr.worker --state-dir DIR``: the worker process."""

from heterotune_flwr.worker.server import main

main()
