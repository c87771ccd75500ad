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

from heterotune_flwr.errors import ExchangeError, FederationError

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
    "is_simulation",
    "registered_keys",
    "select_multikrum",
]


def is_simulation(grid: Grid) -> bool:
    """Whether a grid reaches virtual clients of Flower's simulation alone: all of them are processes of this machine.

    Flower gives a ServerApp such a grid where it runs the clients too; one that reaches nodes over the network, or any
    other, is of another class.
    """
    from flwr.superlink.grid import InMemoryGrid

    return isinstance(grid, InMemoryGrid)


def identify_process() -> None:
    """Let this process make messages although no Flower runtime started it.

    Flower 1.41 writes the process's run, task and node id into every message and raises where they
    are unset; the in-process grid is such a place. Ids that are set stay as they are.
    """
    for field, value in (("_run_id", 0), ("_task_id", 0), ("_node_id", 1)):
        if getattr(TaskIdentity, field) is None:
            setattr(TaskIdentity, field, value)


def registered_keys(address: str, ca: bytes) -> list[tuple[str, bytes, bool]]:
    """Ask a SuperLink for its nodes: (node id, public key as PEM, whether it is let in), as ``flwr supernode list``.

    That command shows no keys, and without them a registration whose answer was lost belongs to nobody.

    Raises
    ------
    FederationError
        It does not answer, or refuses.

    """
    import httpx
    from flwr.proto.control_pb2 import ListNodesRequest
    from flwr.supercore.constant import NodeStatus
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

    try:
        client = ControlHttpClient.from_server_address(
            address, False, ca, [RuntimeVersionHttpInterceptor(component_name="flwr CLI")]
        )
        try:
            listed = client.ListNodes(ListNodesRequest()).nodes_info
        finally:
            client.close()
    except (httpx.HTTPError, OSError, ValueError) as error:
        raise FederationError(
            f"the SuperLink at {address} does not answer ({str(error) or type(error).__name__})"
        ) from error
    return [
        (str(node.node_id), node.public_key, node.status != NodeStatus.UNREGISTERED)
        for node in listed
    ]


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
