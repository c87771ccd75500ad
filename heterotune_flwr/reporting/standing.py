"""How a run stands, by the events of its journal: what is being done, and every client with what was seen of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from heterotune_flwr.federation.journal import client_of
from heterotune_flwr.jsons import as_list, as_mapping, as_number, as_whole
from heterotune_flwr.reporting.time_left import Plan, TimeLeft

#: What is told of steps that tell how far they are; of several, what is counted.
_PROGRESS = {
    "connecting": "waiting for clients: {done} of {of} are there",
    "asking": "asking who the clients are: {done} of {of} answered",
    "aligning": "clients read the public anchors: {done} of {of} answered",
    "testing": "testing: {done} of {of} answered",
}
_FAILED = ("client_failed", "refused", "left_out")


@dataclass
class ClientStanding:
    """What the journal knows of one client.

    Attributes
    ----------
    last_seen
        Seconds since 1970, None before its first answer.
    answers, failures, late
        Trainings that arrived; what was not usable; of these, requests that expired without an answer.
    in_a_row
        Trainings that failed since its last usable one.
    until
        The last round that it sits out because it failed repeatedly.
    out
        Why it does not take part.

    """

    client_id: str
    type_key: str = ""
    bits: str = ""
    examples: float | None = None
    last_seen: float | None = None
    last_round: int | None = None
    answers: int = 0
    failures: int = 0
    late: int = 0
    in_a_row: int = 0
    until: int | None = None
    out: str = ""
    last_failure: str = ""


@dataclass
class Standing:
    """How a run stands.

    Attributes
    ----------
    directory, state, reason
        Where it is, how it stands (:func:`..federation.resume.run_state`), and why.
    going_on
        The command that goes on with a run that was interrupted or has failed.
    loss, accuracy, rouge_l, tested_round
        Of the last round, over the clients; of the last test (the third of generated answers), and after which round.
    bytes_up, bytes_down
        Trainings of the strategy at work, so far.
    eta
        Seconds to the end of the run, the last test included; None while nobody can tell.
    phase
        What is done before the first round.
    doing
        What was asked for last: ``training`` or ``testing``.
    asked, asked_of, since, patience
        Who was asked and has not been heard of, of how many, since when, and after how many seconds they are given up.
    requested
        All who were asked last.
    types
        Of the last round: type -> its means.

    """

    directory: str
    state: str
    reason: str | None = None
    going_on: str = ""
    strategy: str | None = None
    seed: int | None = None
    round: int = 0
    of: int = 0
    loss: float | None = None
    accuracy: float | None = None
    rouge_l: float | None = None
    tested_round: int | None = None
    bytes_up: float = 0.0
    bytes_down: float = 0.0
    eta: float | None = None
    last_event: float | None = None
    phase: str | None = None
    doing: str = ""
    asked: list[str] = field(default_factory=list)
    asked_of: int = 0
    requested: list[str] = field(default_factory=list)
    since: float | None = None
    patience: float | None = None
    types: dict[str, Any] = field(default_factory=dict)
    clients: dict[str, ClientStanding] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @property
    def failing(self) -> list[ClientStanding]:
        """Clients that do not take part, sit out, or failed the last time they were asked; the worst first."""
        found = [c for c in self.clients.values() if c.out or c.until is not None or c.in_a_row]
        return sorted(found, key=lambda c: (not c.out, c.until is None, -c.in_a_row, c.client_id))


class Follower:
    """Keeps a standing up to date with events of the journal, in order; what is malformed in them is passed over."""

    def __init__(self, standing: Standing, plan: Plan | None = None) -> None:
        self.standing = standing
        self.time_left = TimeLeft(plan or Plan())
        self._bits: dict[str, str] = {}
        #: Who was asked to train in this round, but for those whose answer was of no use.
        self._training: set[str] = set()

    def take(self, event: Mapping[str, Any]) -> None:
        """Take one event."""
        standing, kind, at = self.standing, event["event"], as_number(event.get("time"))
        standing.last_event = at = standing.last_event if at is None else at
        self.time_left.take(event)
        if not isinstance(kind, str):
            return
        standing.phase = _phase(kind, event, standing.phase)
        if handler := getattr(self, f"_on_{kind}", None):
            handler(event, at)
        self._of_client(kind, event, at)

    def _on_describe(self, event: Mapping[str, Any], at: float | None) -> None:
        types = as_mapping(event.get("types"))
        self._bits = {key: str(as_mapping(of).get("bits", "")) for key, of in types.items()}
        for client_id, type_key in as_mapping(event.get("members")).items():
            client = self._client(client_id, type_key)
            client.last_seen, client.out = at, ""

    def _on_start(self, event: Mapping[str, Any], at: float | None) -> None:
        standing = self.standing
        standing.strategy, standing.seed = event.get("strategy"), event.get("seed")
        standing.round, standing.of = as_whole(event.get("round")), as_whole(event.get("of"))
        standing.loss = standing.accuracy = standing.rouge_l = standing.tested_round = None
        standing.bytes_up = standing.bytes_down = 0.0
        standing.types = {}
        for client in standing.clients.values():
            client.until, client.in_a_row = None, 0

    _on_resumed = _on_start

    def _on_asked(self, event: Mapping[str, Any], at: float | None) -> None:
        standing = self.standing
        standing.requested = _texts(event.get("asked"))
        standing.asked = list(standing.requested)
        standing.asked_of, standing.since = len(standing.asked), at
        standing.patience = as_number(event.get("seconds"))
        testing = event.get("message_type") == "evaluate"
        standing.doing = "testing" if testing else "training"
        self._training = set() if testing else set(standing.asked)

    def _on_round(self, event: Mapping[str, Any], at: float | None) -> None:
        standing = self.standing
        standing.round = as_whole(event.get("round"), standing.round)
        standing.loss = as_number(event.get("loss"))
        standing.bytes_up = as_number(event.get("bytes_up")) or standing.bytes_up
        standing.bytes_down = as_number(event.get("bytes_down")) or standing.bytes_down
        standing.types = dict(as_mapping(event.get("types")))
        self._end_round()

    def _on_skipped(self, event: Mapping[str, Any], at: float | None) -> None:
        self.standing.round = as_whole(event.get("round"), self.standing.round)
        self._end_round()

    def _on_evaluate(self, event: Mapping[str, Any], at: float | None) -> None:
        means = as_mapping(event.get("overall"))
        accuracy = as_number(means.get("global_accuracy_mean"))
        if accuracy is not None:
            self.standing.rouge_l = as_number(means.get("global_rouge_l_mean"))
            self.standing.accuracy = accuracy
            self.standing.tested_round = as_whole(event.get("round"))
        self._answered()

    def _on_guests(self, event: Mapping[str, Any], at: float | None) -> None:
        """Guests own no examples; what they answered with counts the anchors of their lesson."""
        for client in self.standing.clients.values():
            if client.type_key in _texts(event.get("types")):
                client.examples = 0.0
        self._answered()

    def _on_round_closed(self, event: Mapping[str, Any], at: float | None) -> None:
        for client_id in _texts(event.get("unawaited")):
            self._training.discard(client_id)
            self._heard(client_id)

    def _on_cooldown(self, event: Mapping[str, Any], at: float | None) -> None:
        self._client(event.get("client_id")).until = as_whole(event.get("until"))

    def _on_returned(self, event: Mapping[str, Any], at: float | None) -> None:
        self._client(event.get("client_id")).until = None

    def _end_round(self) -> None:
        for client_id in self._training:
            self._client(client_id).in_a_row = 0
        self._training = set()
        self._answered()

    def _answered(self) -> None:
        """Nobody is waited for."""
        self.standing.asked, self.standing.asked_of, self.standing.since = [], 0, None

    def _heard(self, client_id: str) -> None:
        if client_id in self.standing.asked:
            self.standing.asked.remove(client_id)

    def _client(self, client_id: Any, type_key: Any = None) -> ClientStanding:
        client = self.standing.clients.setdefault(str(client_id), ClientStanding(str(client_id)))
        if type_key:
            client.type_key = str(type_key)
            client.bits = self._bits.get(client.type_key, client.bits)
        return client

    def _of_client(self, kind: str, event: Mapping[str, Any], at: float | None) -> None:
        """What an event says of the client that it names."""
        client_id = client_of(event)
        if client_id is None:
            return
        client = self._client(client_id, event.get("type"))
        if kind in _FAILED:
            client.failures += 1
            client.in_a_row += event.get("message_type") != "evaluate"
            self._training.discard(client.client_id)
            client.late += event.get("straggler") is True
            client.last_failure = str(event.get("reason") or "")
            client.out = client.last_failure if kind == "left_out" else client.out
            self._heard(client.client_id)
        elif kind == "bytes":
            client.last_seen, client.last_round = at, as_whole(event.get("round"))
            self._heard(client.client_id)
        elif kind == "train_reply":
            client.last_seen, client.last_round = at, as_whole(event.get("round"))
            client.answers += 1
            examples = as_number(event.get("examples"))
            client.examples = client.examples if examples is None else examples


def _texts(value: Any) -> list[str]:
    return [str(one) for one in as_list(value)]


def follow(
    events: Iterable[Mapping[str, Any]], standing: Standing, plan: Plan | None = None
) -> Standing:
    """Bring a standing up to date with all events of a journal so far."""
    follower = Follower(standing, plan)
    for event in events:
        follower.take(event)
    if standing.state == "running" and standing.last_event is not None:
        standing.eta = follower.time_left.seconds(standing.last_event)
    return standing


def how_far(event: Mapping[str, Any]) -> str:
    """What a ``progress`` event says, in words; empty where it is of another kind than those known."""
    told = _PROGRESS.get(str(event.get("what")), "")
    return told.format(done=as_whole(event.get("done")), of=as_whole(event.get("clients")))


def _phase(kind: str, event: Mapping[str, Any], before: str | None) -> str | None:
    """What a run is at before its first round; None once rounds are told."""
    if kind == "asking":
        needed = as_whole(event.get("needed"))
        return f"waiting for clients and asking who they are ({needed} are needed)"
    if kind == "progress" and event.get("what") != "testing":
        return how_far(event) or before
    if kind == "starting":
        return f"starting: {event.get('what')}"
    phases: dict[str, str | None] = {
        "journal": "starting",
        "describe": "making the maps of the clients' types",
        "aligning": "a client of each type reads the public anchors",
        "align": "the maps are there",
        "start": "testing the models before the first round",
        "evaluate": None,
        "train_reply": None,
        "round": None,
        "end": "everything is measured; Flower ends",
        "stopping": "stopping everything that was started",
    }
    return phases.get(kind, before)
