"""Who takes part: every client described, grouped by model type, checked before any long work."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from heterotune_flwr.cmga.pull import usual_examples
from heterotune_flwr.errors import FederationError, HeteroTuneError
from heterotune_flwr.exchange.packing import content_bytes
from heterotune_flwr.federation.messenger import (
    Replies,
    make_message,
    send_and_collect,
    wait_for_nodes,
)
from heterotune_flwr.flower import Grid
from heterotune_flwr.names import safe_text
from heterotune_flwr.protocol.messages import DESCRIBE, Header
from heterotune_flwr.protocol.queries import DescribeReply, DescribeRequest
from heterotune_flwr.protocol.wire import RemoteError


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
        return list(self._members)

    def of_type(self, type_key: str) -> list[str]:
        """Ids of the clients of one type, sorted."""
        return list(self._members.get(type_key, ()))

    def info_of(self, type_key: str) -> DescribeReply:
        """What the first client of a type says of itself."""
        return self.clients[self.of_type(type_key)[0]].info

    @functools.cached_property
    def _members(self) -> dict[str, list[str]]:
        """Ids by type, both sorted: asked for every one of thousands of clients."""
        found: dict[str, list[str]] = {}
        for client_id, client in self.clients.items():
            found.setdefault(client.info.type_key, []).append(client_id)
        return dict(sorted(found.items()))

    @property
    def learners(self) -> list[str]:
        """Ids of the clients that have examples to train on, sorted; the others are guests."""
        return [cid for cid, client in self.clients.items() if client.info.train_examples > 0]

    @functools.cached_property
    def usual_examples(self) -> float:
        """Examples of the median client (:mod:`..cmga.pull` says what for)."""
        return usual_examples(client.info.train_examples for client in self.clients.values())

    @property
    def guest_types(self) -> list[str]:
        """Types none of whose clients has examples to train on, sorted."""
        taught = {self.clients[client_id].info.type_key for client_id in self.learners}
        return [key for key in self.type_keys if key not in taught]

    def shapes(self, type_key: str) -> dict[str, tuple[int, ...]]:
        """Trainable tensors of one type."""
        return self.clients[self._members[type_key][0]].info.shapes

    @property
    def labels(self) -> list[str] | None:
        """The closed label set all clients agree on, None for open text."""
        return next(iter(self.clients.values())).info.labels or None

    def node_to_client(self) -> dict[int, str]:
        """Flower node id -> client id."""
        return {client.node_id: cid for cid, client in self.clients.items()}

    def per_type(self, field: str) -> dict[str, float]:
        """A numeric field of the descriptions that is the same for all clients of a type."""
        return {key: float(getattr(self.info_of(key), field)) for key in self.type_keys}


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


@dataclass(frozen=True)
class Need:
    """How many clients a run waits for, and how long; how many it goes on with once some were left out.

    ``begun``: the run has described its clients before, and goes on with those that still answer after the wait.
    """

    waited_for: int
    least: int
    wait_seconds: float
    begun: bool = False


def _check_enough(
    kept: Mapping[str, Client], needed: int, waited_for: int, left: Sequence[LeftOut]
) -> None:
    """Refuse to go on with too few clients, or with guests alone (FederationError)."""
    reason = f"; first reason: {left[0]}" if left else ""
    if len(kept) < needed:
        raise FederationError(f"only {len(kept)} of {waited_for} clients can take part{reason}")
    if not any(client.info.train_examples > 0 for client in kept.values()):
        raise FederationError(
            "every client is a guest: somebody must have examples to train on (types.*.guest, guest in "
            f"node.toml){reason}"
        )


def without(
    roster: Roster, reasons: Mapping[str, str], needed: int, tell: Callable[[LeftOut], None]
) -> Roster:
    """A roster without the clients for whom there is a reason, each of which is told.

    Raises FederationError: fewer than ``needed`` remain, or guests alone; the first reason is named.
    """
    left = [
        LeftOut(roster.clients[cid].node_id, safe_text(cid), safe_text(reasons[cid]))
        for cid in roster.clients
        if cid in reasons
    ]
    for one in left:
        tell(one)
    kept = {cid: client for cid, client in roster.clients.items() if cid not in reasons}
    _check_enough(kept, needed, len(roster.clients), left)
    down, up = (
        {cid: spent[cid] for cid in kept if cid in spent}
        for spent in (roster.bytes_down, roster.bytes_up)
    )
    return replace(roster, clients=kept, bytes_down=down, bytes_up=up)


#: Seconds between two questions to a node that was away.
AGAIN_SECONDS = 5.0


def describe_clients(
    grid: Grid,
    header: Header,
    symbols: bool,
    need: Need,
    timeout: float,
    unfit: Callable[[Mapping[str, Client]], dict[str, str]],
    tell: Callable[[LeftOut], None],
    on_progress: Callable[[int, int], None] | None = None,
    on_waiting: Callable[[int, int], None] | None = None,
) -> Roster:
    """Wait for clients, ask each who it is, and check that they can work together.

    While fewer than needed have answered, or guests alone, and the wait is not over, those whose process died, or
    whose node was away (restarting, say), are asked again, and so are nodes that have come since. Whoever answers with
    something that is wrong, or does not fit the others, is left out, and the run goes on.

    ``header`` names the experiment, seed and method to describe themselves for; ``symbols``: whether their
    vocabularies matter. ``unfit`` says, of clients that have described themselves, who cannot take part
    and why. ``tell`` is called with every node that does not take part, ``on_progress`` with how many have answered,
    and of how many, ``on_waiting`` with how many have appeared. Times are seconds.

    Raises FederationError: too few clients appeared or answered usefully; the first reason is named.
    """
    deadline = time.monotonic() + need.wait_seconds
    nodes = wait_for_nodes(grid, need.waited_for, need.wait_seconds, on_progress=on_waiting)
    if len(nodes) < (need.least if need.begun else need.waited_for):
        raise FederationError(
            f"only {len(nodes)} of {need.waited_for} clients appeared within {need.wait_seconds:.0f} s; start "
            "more, or lower server.min_clients"
        )
    content = DescribeRequest(header, symbols).to_content()
    heard = _Heard()
    while True:
        messages = [make_message(content, node, DESCRIBE, 0, timeout) for node in nodes]
        replies = send_and_collect(grid, messages, timeout, on_progress=on_progress)
        heard.problems |= {node: LeftOut(node, "", why) for node, why in replies.failures.items()}
        heard.read(replies)
        reasons = unfit(heard.found)
        fitting = {cid: client for cid, client in heard.found.items() if cid not in reasons}
        short = heard.answered < need.waited_for or len(fitting) < need.least
        only_guests = not any(client.info.train_examples > 0 for client in fitting.values())
        if not (short or only_guests) or time.monotonic() + AGAIN_SECONDS > deadline:
            break
        if short and not nodes:  # nobody is left to ask
            break
        time.sleep(AGAIN_SECONDS)
        nodes = sorted(set(grid.get_node_ids()) - heard.settled(replies) | replies.passing)
    left_out = [heard.problems[node] for node in sorted(heard.problems)]
    for one in left_out:
        tell(one)
    too_few = heard.answered < need.waited_for and not need.begun
    needed = need.waited_for if too_few else need.least
    _check_enough(heard.found, needed, need.waited_for, left_out)
    found = dict(sorted(heard.found.items()))
    roster = Roster(found, dict.fromkeys(found, content_bytes(content)), heard.received)
    return without(roster, reasons, need.least, tell)


@dataclass
class _Heard:
    """What nodes have said of themselves so far.

    ``found``: by client id; ``problems``: by node id, of those that take no part; ``wrong``: nodes that answered what
    cannot be used, not that they cannot take part: they are not waited for.
    """

    found: dict[str, Client] = field(default_factory=dict)
    received: dict[str, int] = field(default_factory=dict)
    problems: dict[int, LeftOut] = field(default_factory=dict)
    wrong: set[int] = field(default_factory=set)
    _alike: dict[tuple[str, str], Any] = field(default_factory=dict)

    @property
    def answered(self) -> int:
        """How many nodes have described themselves, well or not."""
        return len(self.found) + len(self.wrong)

    def settled(self, replies: Replies) -> set[int]:
        """Nodes that need not be asked again."""
        return {c.node_id for c in self.found.values()} | set(self.problems) - replies.passing

    def read(self, replies: Replies) -> None:
        """Take the descriptions that came back; what is wrong with one goes to ``problems``.

        Of two nodes with one client id the one with the smaller node id is kept, whoever answers first: a node must not
        be able to stop the run of the others by taking the name of one of them.
        """
        for message in replies.messages:
            node_id = message.metadata.src_node_id
            self.problems.pop(node_id, None)
            try:
                info = DescribeReply.from_content(message.content)
            except HeteroTuneError as error:
                refuses = isinstance(error, RemoteError)
                name = error.client_id if isinstance(error, RemoteError) else ""
                self.problems[node_id] = LeftOut(node_id, safe_text(name), safe_text(str(error)))
                if not refuses:
                    self.wrong.add(node_id)
                continue
            self._add(Client(node_id, self._held_once(info)), content_bytes(message.content))

    def _held_once(self, info: DescribeReply) -> DescribeReply:
        """The description, with what many tell alike held once: that of thousands of clients is a hundred megabytes."""
        fields = {name: getattr(info, name) for name in ("shapes", "labels", "vocabulary")}
        once = {
            name: self._alike.setdefault((name, repr(value)), value)
            for name, value in fields.items()
        }
        return replace(info, **once)

    def _add(self, client: Client, received: int) -> None:
        client_id, node_id = client.info.client_id, client.node_id
        if client_id in self.found:
            other = self.found[client_id].node_id
            kept, refused = min(node_id, other), max(node_id, other)
            reason = (
                f"nodes {kept} and {refused} both call themselves {client_id}; {kept} takes part; give each its own "
                "client-id"
            )
            self.problems[refused] = LeftOut(refused, safe_text(client_id), safe_text(reason))
            self.wrong.add(refused)
            if kept == other:
                return
        self.found[client_id] = client
        self.received[client_id] = received
