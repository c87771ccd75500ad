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
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result, Strategy
from flwr.serverapp.strategy.multikrum import select_multikrum
from flwr.supercore.task_identity import TaskIdentity

from heterotune_flwr.errors import ExchangeError

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
    "content_from_bytes",
    "content_to_bytes",
    "identify_process",
    "select_multikrum",
]


def identify_process() -> None:
    """Let this process make messages although no Flower runtime started it.

    Flower 1.41 writes the process's run, task and node id into every message and raises where they
    are unset; the in-process grid is such a place. Ids that are set stay as they are.
    """
    for field, value in (("_run_id", 0), ("_task_id", 0), ("_node_id", 1)):
        if getattr(TaskIdentity, field) is None:
            setattr(TaskIdentity, field, value)


def content_to_bytes(content: RecordDict) -> bytes:
    """A message's content as Flower itself puts it on the wire."""
    data: bytes = recorddict_to_proto(content).SerializeToString()
    return data


def content_from_bytes(data: bytes) -> RecordDict:
    """Inverse of :func:`content_to_bytes`; ExchangeError if the bytes are not such content."""
    try:
        return recorddict_from_proto(ProtoRecordDict.FromString(data))
    except Exception as error:  # protobuf's DecodeError, or a record that refuses its values
        raise ExchangeError(f"malformed message content: {type(error).__name__}") from error
