"""What every heterogeneous strategy shares: the round, and what a strategy may decide in it.

Write an own strategy by subclassing :class:`HeteroStrategy` and overriding one method,

* :meth:`HeteroStrategy.scope`: which tensors are shared with whom, or
* :meth:`HeteroStrategy.combine`: how the updates of one group become one step,

and name it in YAML: ``strategies: {mine: {_component_: my_package.Mine}}``. The class is imported
by the server only; a client never imports what came over the network.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from heterotune_flwr.channels.channel import Aggregated, Purpose, Purposes, ServerChannel
from heterotune_flwr.cmga import pull
from heterotune_flwr.dema.bank import slot_of
from heterotune_flwr.errors import FederationError
from heterotune_flwr.exchange.packing import Tensors, pack
from heterotune_flwr.exchange.trees import State
from heterotune_flwr.federation import evaluation
from heterotune_flwr.federation.admission import Admitted, Intake, admit, read_evaluations
from heterotune_flwr.federation.outcome import Outcome, by_type, statistics
from heterotune_flwr.federation.roster import Roster
from heterotune_flwr.federation.sampling import sample_clients
from heterotune_flwr.federation.session import Maps, StrategyContext
from heterotune_flwr.federation.transport import Transport
from heterotune_flwr.federation.update_gate import Asked
from heterotune_flwr.federation.updates import (
    ClientUpdate,
    Shapes,
    Work,
    check_step,
    mean_delta,
    training_summary,
)
from heterotune_flwr.flower import (
    ArrayRecord,
    ConfigRecord,
    Grid,
    Message,
    MetricRecord,
    Result,
    Strategy,
)
from heterotune_flwr.protocol.messages import (
    EVALUATE,
    TRAIN,
    EvaluateRequest,
    Header,
    TrainRequest,
)
from heterotune_flwr.protocol.payloads import Payload
from heterotune_flwr.rates import sinking_share
from heterotune_flwr.schema import MethodConfig, TrainConfig, TypeConfig
from heterotune_flwr.strategies import guests, opening, snapshot
from heterotune_flwr.strategies.groups import GLOBAL, Groups, Scope

__all__ = ["GLOBAL", "HeteroStrategy", "Scope"]


class HeteroStrategy(Strategy):
    """Federated training of different model types: rounds, scopes, bookkeeping.

    The server holds one copy of every *group* of shared tensors: ``global`` for all clients,
    ``type/<key>`` for the clients of one model type. A client receives the slice of its type,
    trains, and returns deltas; what has scope ``client`` never leaves it.

    Parameters
    ----------
    context
        Name, configuration, seed, session, channels; see :class:`StrategyContext`.

    """

    #: Whether the strategy is nothing without a channel that clients learn from.
    needs_teacher: ClassVar[bool] = False
    #: Why no ``server_optimizer`` fits the class; empty: one does.
    own_server_step: ClassVar[str] = ""
    #: Attributes that a checkpoint must hold; of every class on the way up all count.
    remembered: ClassVar[tuple[str, ...]] = ("taught", "_optimizer_states", "_empty_rounds")

    def __init__(self, context: StrategyContext) -> None:
        self.context = context
        self.config = context.config
        self.method = context.config.method
        self.rounds = context.config.server.rounds
        self.optimizer = context.optimizer
        self.outcome = Outcome(context.name, context.seed)
        #: Set when the run opens (:mod:`.opening`).
        self.roster: Roster
        self.transport: Transport
        self.groups: Groups
        self.channels: list[ServerChannel] = []
        self.maps: Maps | None = None
        self._optimizer_states: dict[str, dict[str, State]] = {}
        self._empty_rounds = 0
        #: What has seen the answers of the round under way arrive.
        self._intake: Intake | None = None
        #: After which round guests were taught; 0: not yet.
        self.taught = 0
        #: When the strategy began (seconds of a clock that only runs forward), an earlier start's time included.
        self.begin = 0.0

    @property
    def state(self) -> dict[str, Tensors]:
        """Group -> name -> value."""
        return self.groups.state

    # ------------------------------------------------------------------ what a subclass overrides

    def scope(self, name: str, type_key: str) -> Scope:
        """Say who shares a tensor: ``global``, ``type`` (the default) or ``client``.

        ``fixed`` is for one that keeps its first value, a function of the run's seed, and never travels.
        """
        return "type"

    def combine(self, group: str, round: int, updates: Sequence[ClientUpdate]) -> Tensors:
        """Turn the updates of one group into the change of its tensors (default: weighted mean, or ``robust``).

        ``updates`` hold only the tensors of this group, in client order; never empty.
        """
        return mean_delta(updates, self.context.mean)

    def frozen(self, type_key: str, server_round: int) -> Collection[str]:
        """Names of the tensors that clients of a type hold fixed in a round; extend, do not replace."""
        return self.groups.fixed[type_key]

    def at_work(self, server_round: int) -> Sequence[ServerChannel]:
        """The channels at work in a round (default: all that are on)."""
        return self.channels

    def client_method(self, client_id: str) -> MethodConfig:
        """The adapter of one client, where it differs from the others' (LoRA of another rank)."""
        return self.method

    def client_shapes(self, client_id: str) -> Shapes:
        """Shapes of one client's tensors."""
        return self.roster.shapes(self.type_of(client_id))

    def outgoing(self, client_id: str) -> Tensors:
        """What a client is sent: the slice of its type."""
        return self.groups.slice(self.type_of(client_id))

    def differ_after(self, server_round: int) -> bool:
        """Whether clients of one type can hold different models after a round; before round 1 they are the backbone."""
        return self.models_differ and server_round > 0

    def row_type(self, client_id: str) -> str:
        """Under which type a client's tests are reported."""
        return self.type_of(client_id)

    def learning_rate(self, server_round: int) -> float:
        """What clients train at in a round, 1 to T: ``last + (1 - last) (1 + cos(pi (t - 1) / (T - 1))) / 2`` of it.

        Cosine annealing (arXiv 1608.03983) over the rounds; ``last`` is ``train.last_rate``, 1 for a constant rate.
        """
        train, done = self.config.train, (server_round - 1) / max(self.rounds - 1, 1)
        share = train.last_rate + (1 - train.last_rate) * sinking_share(done)
        return train.learning_rate * share

    def begin_round(self, server_round: int) -> None:
        """Prepare a round, before its messages are made."""

    def after_aggregate(self, server_round: int) -> None:
        """Change ``state`` once all groups have taken a round's steps, before anything is kept or sent."""

    def for_guests(self) -> Tensors:
        """What types without examples take of the tensors that all types share, after the last round."""
        return self.state.get(GLOBAL, {})

    def round_log(self) -> dict[str, Any]:
        """Further facts about the last round for the journal; JSON-able."""
        return {}

    @classmethod
    def channel_entries(cls, entries: Mapping[str, Any]) -> Mapping[str, Any]:
        """The entry's channels as the class has them: name -> options, null for off (ConfigError: cannot be)."""
        return entries

    @classmethod
    def check_types(cls, bits: Mapping[str, str]) -> None:
        """Refuse model types (type -> bits) this strategy cannot work with, before anything runs (ConfigError)."""

    @classmethod
    def check_backbones(cls, types: Sequence[TypeConfig], options: Mapping[str, Any]) -> None:
        """Refuse backbones that do not fit the class's options, where a simulated run's files tell (ConfigError)."""

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Refuse wrong values of the class's own options before anything runs (ConfigError)."""

    def prepare(self, grid: Grid) -> None:
        """Find out who takes part, and make everything ready for round 1 (:mod:`.opening`)."""
        opening.open_run(self)

    def state_dict(self) -> State:
        """What a checkpoint holds besides the shared tensors: all ``remembered`` attributes.

        Nested dictionaries, lists, numbers, texts and arrays; extend it where an attribute is of another kind.
        """
        return {name: getattr(self, name) for name in self._remembered()}

    def load_state_dict(self, state: State) -> None:
        """Go on from :meth:`state_dict` (called after :meth:`prepare`)."""
        for name in self._remembered():
            setattr(self, name, state[name])
        if self.taught:
            self.groups.fork_global(self.roster.guest_types)

    def _remembered(self) -> list[str]:
        return sorted(
            {name for kind in type(self).__mro__ for name in vars(kind).get("remembered", ())}
        )

    # ------------------------------------------------------------------------- what others read

    @property
    def models_differ(self) -> bool:
        """Whether clients of one type can hold different models (some tensor never leaves them)."""
        return any(
            len(self.groups.of[key]) + len(self.groups.fixed[key]) < len(self.roster.shapes(key))
            for key in self.roster.type_keys
        )

    def type_of(self, client_id: str) -> str:
        """Model type of a client."""
        return self.roster.clients[client_id].info.type_key

    def shares(self, type_key: str, slot: int) -> bool:
        """Whether a type's slot is aligned well enough to share across types (METHOD 3.5)."""
        if self.maps is None:
            return False
        if self.config.alignment.control != "none":  # a control must show its damage
            return True
        return self.maps.quality[type_key][slot] >= self.config.alignment.quality_threshold

    def shared_tensors(self) -> Tensors:
        """Every group's tensors as ``<group>/<name>``: what is saved and returned at the end, the channels' too."""
        shared = {
            f"{group}/{name}": value
            for group, tensors in self.state.items()
            for name, value in tensors.items()
        }
        for channel in self.channels:
            shared |= channel.tensors()
        return shared

    # ------------------------------------------------------------------------------- the round

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message per sampled client; what is sent is ``state``."""
        self.begin_round(server_round)
        server, cooldowns = self.config.server, self.transport.safety.cooldown
        for client_id in cooldowns.returned(server_round):
            self.transport.event("returned", round=server_round, client_id=client_id)
        sampled = sample_clients(
            self.roster.learners, server.participation, self.context.seed, server_round,
            cooldowns.cooling(server_round), server.oversample,
        )  # fmt: skip
        train = self.training(server_round)
        return [
            self.train_message(
                cid, server_round, train, self._payloads(server_round, cid, {"train"})
            )
            for cid in sampled
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check every update, combine group by group, apply all at once, then let the channels aggregate.

        With fewer usable updates than ``server.min_results`` the round is skipped: None, and nothing has changed but
        who is counted and cooling down.
        """
        admitted = self.admit(server_round, replies)
        if len(admitted.candidates) < self.config.server.min_results:
            return self._skip(server_round, len(admitted.candidates))
        self.groups.apply(
            {
                group: self._step(group, server_round, updates)
                for group, updates in self.groups.divide(admitted.updates)
            }
        )
        self.after_aggregate(server_round)
        self.transport.safety.gate.learn(admitted.candidates)
        summary = training_summary(admitted.reports)
        logs = summary["channels"] = {}
        for channel in self.at_work(server_round):
            payloads = admitted.payloads(channel.name)
            aggregated = channel.aggregate(server_round, payloads, admitted.updates)
            logs[channel.name] = self.record(channel.name, server_round, aggregated)
        self._journal_round(server_round, summary)
        numbers = {key: value for key, value in summary.items() if isinstance(value, float)}
        return None, MetricRecord({**numbers, "clients": len(admitted.candidates)})

    def training(self, server_round: int) -> TrainConfig:
        """The training settings of a round."""
        return replace(self.config.train, learning_rate=self.learning_rate(server_round))

    def _payloads(
        self, server_round: int, client_id: str, purposes: Iterable[Purpose]
    ) -> dict[str, Payload]:
        """What the channels at work ask and bring in one message."""
        channels, type_key = self.at_work(server_round), self.type_of(client_id)
        wanted: set[Purpose] = set(purposes)
        if "train" in wanted:
            wanted.update(*(channel.purposes(server_round, type_key) for channel in channels))
        return self.payloads(channels, server_round, client_id, wanted)

    @staticmethod
    def payloads(
        channels: Iterable[ServerChannel], server_round: int, client_id: str, purposes: Purposes
    ) -> dict[str, Payload]:
        """What some channels ask and bring."""
        asked = {c.name: c.request(server_round, client_id, purposes) for c in channels}
        return {name: payload for name, payload in asked.items() if payload is not None}

    def train_message(
        self,
        client_id: str,
        server_round: int,
        train: TrainConfig,
        payloads: Mapping[str, Payload],
    ) -> Message:
        """Build one client's training message."""
        digest, maps = self.transport.maps_for(client_id)
        request = TrainRequest(
            header=self._header(server_round, client_id, train),
            tensors=self.outgoing(client_id),
            maps_digest=digest,
            maps=maps,
            expected=sorted(self._trained_by(client_id, server_round)),
            frozen=sorted(self.frozen(self.type_of(client_id), server_round)),
            channels=payloads,
        )
        return self.transport.message(client_id, request, TRAIN, server_round)

    def admit(self, server_round: int, replies: Iterable[Message]) -> Admitted:
        """Read replies through the gate, and give every client that failed a strike."""
        intake, self._intake = self._intake or self._make_intake(server_round), None
        admitted = admit(self.transport, server_round, replies, intake)
        fine = admitted.candidates
        failed = set(self.transport.failed) - set(fine)
        cooldowns = self.transport.safety.cooldown
        newly = cooldowns.record(server_round, fine, failed, self.roster.learners)
        for client_id, until in newly.items():
            self.transport.event("cooldown", round=server_round, client_id=client_id, until=until)
        return admitted

    def _make_intake(self, server_round: int) -> Intake:
        train, clients = self.training(server_round), self.roster.clients
        return Intake(
            self.transport,
            lambda cid: self.asked_of(cid, server_round, train, clients[cid].info.train_examples),
        )

    def _step(self, group: str, server_round: int, updates: Sequence[ClientUpdate]) -> Tensors:
        """One group's step as the server optimizer takes it."""
        step = self.combine(group, server_round, updates)
        where = f"strategy {self.context.name}, round {server_round}"
        check_step(step, self.state[group], where)
        states = self._optimizer_states.setdefault(group, {})
        taken: Tensors = {}
        for name, change in step.items():
            states[name], new = self.optimizer.step(states.get(name, {}), change.astype(np.float64))
            taken[name] = new.astype(np.float32)
        return taken

    def record(self, channel: str, server_round: int, aggregated: Aggregated) -> dict[str, Any]:
        """Put on record what a channel refuses and finds; returns its part of the round's summary."""
        for note in aggregated.notes:
            self.transport.event(
                "channel_note", round=server_round, channel=channel, text=note.text, **note.facts
            )
        for client_id, reason in sorted(aggregated.refused.items()):
            self.transport.safety.gate.count(client_id, channel)
            self.transport.refuse(
                client_id, server_round, reason, "payload_refused", channel=channel
            )
        return dict(aggregated.log)

    def _skip(self, server_round: int, usable: int) -> tuple[None, None]:
        needed = self.config.server.min_results
        self.outcome.skipped.append(server_round)
        self.transport.event("skipped", round=server_round, usable=usable, needed=needed)
        return None, None

    def _trained_by(self, client_id: str, server_round: int) -> list[str]:
        """Names of the shared tensors a client trains: from its lowest trained slot on, but for the frozen."""
        info = self.roster.clients[client_id].info
        held = self.frozen(info.type_key, server_round)
        names = self.groups.of[info.type_key]
        return [n for n in names if slot_of(n) >= info.lowest_slot and n not in held]

    def asked_of(
        self, client_id: str, server_round: int, train: TrainConfig, examples: int
    ) -> Asked:
        """Against what a client's answer is checked; ``examples``: texts in use at most."""
        info = self.roster.clients[client_id].info
        shapes = self.client_shapes(client_id)
        trained = {n: shapes[n] for n in self._trained_by(client_id, server_round)}
        return Asked(
            client_id=client_id,
            type_key=info.type_key,
            round=server_round,
            code_hash=info.code_hash,
            maps_digest=self.transport.maps_for(client_id)[0],
            shapes=trained,
            work=Work(
                examples, train.local_steps, train.learning_rate, train.optimizer, train.clip_norm,
                train.warmup_ratio, pull.MOST * self.roster.usual_examples,
            ),
            expected=self.transport.expected(trained),
        )  # fmt: skip

    def _journal_round(self, server_round: int, summary: Mapping[str, Any]) -> None:
        ledger = self.transport.ledger
        entry = {
            "round": server_round,
            **summary,
            **self.round_log(),
            "bytes_up": ledger.train_up,
            "bytes_down": ledger.train_down,
        }
        peak = summary.get("peak_memory_mb")
        if peak is not None:
            self.outcome.peak_memory_mb = max(self.outcome.peak_memory_mb or 0.0, peak)
        self.outcome.rounds.append({"event": "round", **entry})
        self.transport.event("round", of=self.rounds, **entry)

    # -------------------------------------------------------------------------------- evaluation

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask for tests as :mod:`.evaluation` plans them (all models are equal before round 1)."""
        differ = self.differ_after(server_round)
        return self._evaluate_messages(
            evaluation.plan(self.roster, differ, self.tested), server_round
        )

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Make one row per client and journal the statistics; None when nobody answered."""
        answers = read_evaluations(self.transport, server_round, replies)
        if not answers:
            return None
        differ = self.differ_after(server_round)
        rows = evaluation.rows(self.roster, answers, differ, self.tested)
        for row in rows:
            row.type_key = self.row_type(row.client_id)
        self.outcome.rows = rows
        if server_round == 0:
            self.outcome.before = rows
        overall = statistics(rows)
        counts = {"tested": len(self.tested), "clients": len(self.roster.clients)}
        entry = {"round": server_round, **counts, "types": by_type(rows), "overall": overall}
        self.outcome.rounds.append({"event": "evaluate", **entry})
        self.transport.event("evaluate", of=self.rounds, **entry)
        return MetricRecord({key: float(value) for key, value in overall.items()})

    @property
    def tested(self) -> list[str]:
        """Ids of the clients that are tested, sorted."""
        return evaluation.tested(
            self.roster, self.config.server.evaluate_clients, self.context.seed
        )

    def _evaluate_messages(
        self, asked: Mapping[str, list[str]], server_round: int
    ) -> list[Message]:
        messages = []
        for client_id, test_sets in asked.items():
            digest, maps = self.transport.maps_for(client_id)
            header = self._header(server_round, client_id, self.config.train)
            payloads = self._payloads(server_round, client_id, {"test"})
            request = EvaluateRequest(
                header, self.outgoing(client_id), digest, maps, test_sets, payloads
            )
            messages.append(self.transport.message(client_id, request, EVALUATE, server_round))
        return messages

    def _evaluate(self, server_round: int, grid: Grid, result: Result) -> None:
        """Evaluate once; where a type's speaker fails, its other clients are asked in turn."""
        messages = list(self.configure_evaluate(server_round, ArrayRecord(), ConfigRecord(), grid))
        collected = self.transport.collect(grid, messages, EVALUATE, server_round)
        who = self.tested
        tried = {evaluation.speaker(self.roster, key, who) or "" for key in self.roster.type_keys}
        while not self.differ_after(server_round):
            answers = read_evaluations(self.transport, server_round, collected)
            asked = evaluation.plan_again(self.roster, answers, who, tried)
            if not asked:
                break
            tried |= set(asked)
            messages = self._evaluate_messages(asked, server_round)
            collected += self.transport.collect(grid, messages, EVALUATE, server_round)
        record = self.aggregate_evaluate(server_round, collected)
        if record is None:
            self.outcome.rows = []  # an older evaluation must not pass for this one
        else:
            result.evaluate_metrics_clientapp[server_round] = record

    # ---------------------------------------------------------------------------------- the loop

    def summary(self) -> None:
        """Write what is about to run into the journal."""
        self.transport.event(
            "start",
            of=self.rounds,
            clients=len(self.roster.clients),
            shared={group: len(tensors) for group, tensors in self.state.items()},
        )

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run all rounds; Flower's arguments are accepted, what they leave open is configured.

        Round 0 is an evaluation of the untouched backbones, so that before and after exist, unless
        ``server.evaluate_before`` is false. A resumed run goes on after its last checkpoint; Flower's ``Result`` then
        has the later rounds only, the journal all of them.

        Raises
        ------
        HeteroTuneError
            The federation cannot start, or no update was usable in several rounds in a row.

        """
        self.begin = time.monotonic()
        if num_rounds is not None:
            self.rounds = num_rounds
        self.prepare(grid)
        self.summary()
        result = Result()
        done, evaluated = snapshot.go_on(self)
        self.context.session.maps.keep()
        if not evaluated or (done == self.rounds and guests.waiting(self)):
            self._close(done, grid, result)
        settings = train_config or ConfigRecord()
        for server_round in range(done + 1, self.rounds + 1):
            messages = list(self.configure_train(server_round, ArrayRecord(), settings, grid))
            self._intake = self._make_intake(server_round)
            replies = self.transport.collect(
                grid, messages, TRAIN, server_round, arrived=self._intake.arrived
            )
            _, record = self.aggregate_train(server_round, replies)
            self._check_progress(server_round, record)
            snapshot.save(self, server_round, evaluated=False)
            if record is not None:
                result.train_metrics_clientapp[server_round] = record
            self._close(server_round, grid, result)
            if evaluate_fn is not None:
                central = evaluate_fn(server_round, self.arrays())
                if central is not None:
                    result.evaluate_metrics_serverapp[server_round] = central
        result.arrays = self.arrays()
        self._finish(time.monotonic() - self.begin)
        return result

    def _close(self, server_round: int, grid: Grid, result: Result) -> None:
        """What follows a round: guests after the last one, and a test where one is due."""
        if server_round == self.rounds:
            guests.teach(self, grid)
        if self._evaluates(server_round):
            self._evaluate(server_round, grid, result)
            snapshot.save(self, server_round, evaluated=True)

    def _evaluates(self, server_round: int) -> bool:
        if server_round == 0:
            return self.config.server.evaluate_before
        every = self.config.server.evaluate_every
        return server_round == self.rounds or (every > 0 and server_round % every == 0)

    def _check_progress(self, server_round: int, record: MetricRecord | None) -> None:
        """Give up when round after round brings nothing: the same error would repeat for ever."""
        self._empty_rounds = 0 if record is not None else self._empty_rounds + 1
        patience = self.config.server.give_up_after
        if patience and self._empty_rounds >= min(patience, self.rounds):
            reason = self.transport.first_failure or "nobody failed; too few were asked"
            needed = self.config.server.min_results
            missing = "no usable update" if needed == 1 else f"fewer than {needed} usable updates"
            raise FederationError(
                f"{self.context.name}, round {server_round}: {missing} in "
                f"{self._empty_rounds} rounds; first reason: {reason}"
            )

    def _finish(self, seconds: float) -> None:
        self.outcome.seconds = seconds
        self.outcome.population = len(self.roster.clients)
        self.outcome.refused = self.transport.safety.gate.counts
        self.outcome.bytes = self.transport.ledger.summary(
            self.roster.per_type("lora16_bytes"),
            self.roster.per_type("model_bytes"),
            {key: len(self.roster.of_type(key)) for key in self.roster.type_keys},
        )
        if self.maps is not None:
            self.outcome.alignment = {"quality": self.maps.quality}
        self.transport.event("strategy_end", seconds=seconds, overall=statistics(self.outcome.rows))

    def _header(self, server_round: int, client_id: str, train: TrainConfig) -> Header:
        method = self.client_method(client_id)
        return Header(self.context.experiment, self.context.seed, method, server_round, train)

    def arrays(self) -> ArrayRecord:
        """All shared tensors, as Flower keeps them."""
        return pack(self.shared_tensors(), "fp32")
