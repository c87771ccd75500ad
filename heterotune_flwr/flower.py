"""The one module that imports Flower: its public paths move between minor versions."""

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result, Strategy
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "Array",
    "ArrayRecord",
    "ClientApp",
    "ConfigRecord",
    "Context",
    "Error",
    "Grid",
    "Message",
    "MessageType",
    "MetricRecord",
    "RecordDict",
    "Result",
    "ServerApp",
    "Strategy",
    "identify_process",
]


def identify_process() -> None:
    """Let this process make messages although no Flower runtime started it.

    Flower 1.41 writes the process's run, task and node id into every message and raises where they
    are unset; the in-process grid is such a place. Ids that are set stay as they are.
    """
    for field, value in (("_run_id", 0), ("_task_id", 0), ("_node_id", 1)):
        if getattr(TaskIdentity, field) is None:
            setattr(TaskIdentity, field, value)
