"""Who takes part: every client described, grouped by model type, checked before any long work."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from heterotune_flwr.config.schema import MethodConfig
from heterotune_flwr.errors import ConfigError, FederationError, HeteroTuneError
from heterotune_flwr.exchange.packing import content_bytes
from heterotune_flwr.federation.messenger import (
    Replies,
    converse,
    make_message,
    wait_for_nodes,
)
from heterotune_flwr.federation.protocol import DESCRIBE, Header
from heterotune_flwr.federation.queries import DescribeReply, DescribeRequest
from heterotune_flwr.federation.wire import RemoteError, one_line
from heterotune_flwr.flower import Grid


@dataclass(frozen=True)
class Client:
    """A connected client: Flower's node id (of this run only) and its own description."""

    node_id: int
    info: DescribeReply


@dataclass(frozen=True)
class Roster:
    """All clients by their stable id, in sorted order.

    ``bytes_down`` and ``bytes_up`` are what asking them cost, per client id.
    """

    clients: dict[str, Client]
    bytes_down: dict[str, int]
    bytes_up: dict[str, int]

    @property
    def type_keys(self) -> list[str]:
        """Model types present, sorted."""
        return sorted({client.info.type_key for client in self.clients.values()})

    def of_type(self, type_key: str) -> list[str]:
        """Ids of the clients of one type, sorted."""
        return [cid for cid, client in self.clients.items() if client.info.type_key == type_key]

    @property
    def learners(self) -> list[str]:
        """Ids of the clients that have examples to train on, sorted; the others are guests."""
        return [cid for cid, client in self.clients.items() if client.info.train_examples > 0]

    @property
    def guest_types(self) -> list[str]:
        """Types none of whose clients has examples to train on, sorted."""
        taught = {self.clients[client_id].info.type_key for client_id in self.learners}
        return [key for key in self.type_keys if key not in taught]

    def shapes(self, type_key: str) -> dict[str, tuple[int, ...]]:
        """Trainable tensors of one type."""
        return self.clients[self.of_type(type_key)[0]].info.shapes

    @property
    def labels(self) -> list[str] | None:
        """The closed label set all clients agree on, None for open text."""
        return next(iter(self.clients.values())).info.labels or None

    def node_to_client(self) -> dict[int, str]:
        """Flower node id -> client id."""
        return {client.node_id: cid for cid, client in self.clients.items()}

    def per_type(self, field: str) -> dict[str, float]:
        """A numeric field of the descriptions that is the same for all clients of a type."""
        return {
            key: float(getattr(self.clients[self.of_type(key)[0]].info, field))
            for key in self.type_keys
        }


@dataclass(frozen=True)
class LeftOut:
    """A node that does not take part, and why; ``client_id`` is what it calls itself, empty where it did not say."""

    node_id: int
    client_id: str
    reason: str

    def __str__(self) -> str:
        """One line."""
        name = f" ({self.client_id})" if self.client_id else ""
        return f"node {self.node_id}{name}: {self.reason}"


def _same(clients: Mapping[str, Client], field: str, what: str, mend: str) -> None:
    """Refuse clients that differ in ``field``, naming two of them."""
    first_id, first = next(iter(clients.items()))
    for client_id, client in clients.items():
        if getattr(client.info, field) != getattr(first.info, field):
            raise FederationError(f"{first_id} and {client_id} differ in {what}: {mend}")


def check_roster(roster: Roster, method: MethodConfig) -> None:
    """Refuse mixtures that would make a run meaningless.

    Raises
    ------
    FederationError
        Clients run different versions of the code, know different labels, or own different
        weights or tensors under one type name; or all are guests.
    ConfigError
        More slots than the shallowest backbone has blocks.

    """
    clients = roster.clients
    if not roster.learners:
        raise FederationError(
            "every client is a guest: somebody must have examples to train on (types.*.guest, guest in node.toml)"
        )
    _same(clients, "code_hash", "their version of this program", "install the same one everywhere")
    _same(clients, "labels", "their labels", "set data.labels to the full list of answers")
    for type_key in roster.type_keys:
        members = {cid: clients[cid] for cid in roster.of_type(type_key)}
        _same(
            members, "fingerprint", f"the weights they call {type_key}",
            "use the same backbone file or revision, or another name for the other one",
        )  # fmt: skip
        _same(members, "shapes", f"the tensors they train as {type_key}", "use one configuration")
    shallowest = min(clients.values(), key=lambda client: client.info.layers)
    if method.kind == "dema" and method.slots > shallowest.info.layers:
        raise ConfigError(
            f"method.slots is {method.slots} but {shallowest.info.type_key} has only "
            f"{shallowest.info.layers} blocks; set method.slots to at most {shallowest.info.layers}"
        )


#: Seconds between two questions to a node that was away.
AGAIN_SECONDS = 5.0


def describe_clients(
    grid: Grid,
    header: Header,
    words: list[str],
    minimum: int,
    wait_seconds: float,
    timeout: float,
    tell: Callable[[LeftOut], None],
    on_progress: Callable[[int, int], None] | None = None,
) -> Roster:
    """Wait for clients, ask each who it is, and check that they can work together.

    While fewer than ``minimum`` have answered, or guests alone, and the wait is not over, those whose process died, or
    whose node was away (restarting, say), are asked again, and so are nodes that have come since.

    Parameters
    ----------
    grid, header
        Whom to ask, and the experiment, seed and method to describe themselves for.
    words
        Public word list, empty when no alignment is needed.
    minimum, wait_seconds
        How many clients are needed and how long to wait for them.
    timeout
        Seconds to wait for the answers.
    tell
        Called with every node that does not take part.
    on_progress
        Called with how many have answered, and of how many, as they do.

    Raises
    ------
    FederationError
        Too few clients appeared or answered usefully; the first reason is named.

    """
    deadline = time.monotonic() + wait_seconds
    nodes = wait_for_nodes(grid, minimum, wait_seconds)
    if len(nodes) < minimum:
        raise FederationError(
            f"only {len(nodes)} of {minimum} clients appeared within {wait_seconds:.0f} s; start "
            "more, or lower server.min_clients"
        )
    content = DescribeRequest(header, words).to_content()
    found: dict[str, Client] = {}
    received: dict[str, int] = {}
    problems: dict[int, LeftOut] = {}
    while True:
        messages = [make_message(content, node, DESCRIBE, 0, timeout) for node in nodes]
        replies = converse(grid, messages, timeout, on_progress=on_progress)
        problems |= {node: LeftOut(node, "", why) for node, why in replies.failures.items()}
        _read(replies, found, received, problems)
        short = len(found) < minimum
        only_guests = not any(client.info.train_examples > 0 for client in found.values())
        if not (short or only_guests) or time.monotonic() + AGAIN_SECONDS > deadline:
            break
        if short and not nodes:  # nobody is left to ask
            break
        time.sleep(AGAIN_SECONDS)
        known = {client.node_id for client in found.values()} | set(problems) - replies.passing
        nodes = sorted(set(grid.get_node_ids()) - known | replies.passing)
    left_out = [problems[node] for node in sorted(problems)]
    for one in left_out:
        tell(one)
    if len(found) < minimum:
        reason = left_out[0] if left_out else "no reason known"
        raise FederationError(
            f"only {len(found)} of {minimum} clients can take part; first reason: {reason}"
        )
    ordered = dict(sorted(found.items()))
    sent = content_bytes(content)
    roster = Roster(ordered, dict.fromkeys(ordered, sent), received)
    check_roster(roster, header.method)
    return roster


def _read(
    replies: Replies,
    found: dict[str, Client],
    received: dict[str, int],
    problems: dict[int, LeftOut],
) -> None:
    """Take the descriptions that came back, by client id; what is wrong with one goes to ``problems``.

    Of two nodes with one client id the one with the smaller node id is kept, whoever answers first: a node must not be
    able to stop the run of the others by taking the name of one of them.
    """
    for message in replies.messages:
        node_id = message.metadata.src_node_id
        problems.pop(node_id, None)
        try:
            info = DescribeReply.from_content(message.content)
        except HeteroTuneError as error:
            name = error.client_id if isinstance(error, RemoteError) else ""
            problems[node_id] = LeftOut(node_id, one_line(name), one_line(str(error)))
            continue
        client_id = info.client_id
        if client_id in found:
            other = found[client_id].node_id
            kept, refused = min(node_id, other), max(node_id, other)
            reason = (
                f"nodes {kept} and {refused} both call themselves {client_id}; {kept} takes part; give each its own "
                "client-id"
            )
            problems[refused] = LeftOut(refused, one_line(client_id), one_line(reason))
            if kept == other:
                continue
        found[client_id] = Client(node_id, info)
        received[client_id] = content_bytes(message.content)
