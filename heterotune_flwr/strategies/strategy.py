"""What every heterogeneous strategy shares: clients of different model types in one run.

Write an own strategy by subclassing :class:`HeteroStrategy` and overriding one method,

* :meth:`HeteroStrategy.scope`: which tensors are shared with whom, or
* :meth:`HeteroStrategy.combine`: how the updates of one group become one step,

and name it in YAML: ``strategies: {mine: {_component_: my_package.Mine}}``. The class is imported
by the server only; a client never imports what came over the network.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from heterotune_flwr.channels.predictions.server import PredictionEnsemble
from heterotune_flwr.channels.statistics.server import PooledClassifier
from heterotune_flwr.cmga import pull
from heterotune_flwr.dema.bank import slot_of
from heterotune_flwr.errors import FederationError
from heterotune_flwr.exchange.packing import Tensors, pack
from heterotune_flwr.federation import evaluation
from heterotune_flwr.federation.admission import Intake, admit, read_evaluations
from heterotune_flwr.federation.outcome import by_type, statistics
from heterotune_flwr.federation.sampling import sample_clients
from heterotune_flwr.federation.update_gate import Asked
from heterotune_flwr.federation.updates import (
    ClientUpdate,
    Work,
    check_step,
    training_summary,
)
from heterotune_flwr.flower import (
    ArrayRecord,
    ConfigRecord,
    Grid,
    Message,
    MetricRecord,
    Result,
)
from heterotune_flwr.protocol.messages import (
    EVALUATE,
    TRAIN,
    EvaluateRequest,
    Header,
    TrainReply,
    TrainRequest,
)
from heterotune_flwr.strategies import guests, snapshot
from heterotune_flwr.strategies.sharing import GLOBAL, Assignment, Scope, Sharing

__all__ = ["GLOBAL", "HeteroStrategy", "Scope"]


class HeteroStrategy(Sharing):
    """Federated training of different model types: rounds, scopes, bookkeeping.

    The server holds one copy of every *group* of shared tensors: ``global`` for all clients,
    ``type/<key>`` for the clients of one model type. A client receives the slice of its type,
    trains, and returns deltas; what has scope ``client`` never leaves it.

    Parameters
    ----------
    context
        Name, configuration, seed and session; see :class:`StrategyContext`.

    """

    def summary(self) -> None:
        """Write what is about to run into the journal."""
        self.transport.event(
            "start",
            of=self.rounds,
            clients=len(self.roster.clients),
            shared={group: len(tensors) for group, tensors in self.state.items()},
        )

    # ---------------------------------------------------------------------------------- training

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message per sampled client; ``arrays`` mirrors ``state``, which is what is sent."""
        self.begin_round(server_round)
        server, seed = self.config.server, self.context.seed
        cooldown = self.transport.safety.cooldown
        for client_id in cooldown.returned(server_round):
            self.transport.event("returned", round=server_round, client_id=client_id)
        sampled = sample_clients(
            self.roster.learners, server.participation, seed, server_round,
            cooldown.cooling(server_round), server.oversample,
        )  # fmt: skip
        return [
            self.train_message(client_id, server_round, self._assignment(server_round, client_id))
            for client_id in sampled
        ]

    def _assignment(self, server_round: int, client_id: str) -> Assignment:
        """What a client is asked for in a round."""
        info = self.roster.clients[client_id].info
        consensus = self.consensus if self.learns_in(server_round) else None
        return Assignment(
            steps=self.config.train.local_steps,
            learning_rate=self.learning_rate(server_round),
            lesson=consensus.lesson(server_round, info.type_key) if consensus else None,
            examples=info.train_examples,
        )

    def train_message(self, client_id: str, server_round: int, work: Assignment) -> Message:
        """Build one client's training message."""
        train = self.config.train
        type_key = self.roster.clients[client_id].info.type_key
        digest, maps = self.transport.maps_for(client_id)
        lesson = work.lesson
        # What it predicts of anchors, and what it fits to others' predictions there, has the discriminant's share.
        reads = lesson is not None and (lesson.wanted > 0 or not lesson.is_empty)
        request = TrainRequest(
            header=self._header(server_round, client_id),
            tensors=self.outgoing(client_id),
            maps_digest=digest,
            maps=maps,
            expected=sorted(self._trained_by(client_id, server_round)),
            local_steps=work.steps,
            learning_rate=work.learning_rate,
            optimizer=train.optimizer,
            proximal=train.proximal,
            warmup_ratio=train.warmup_ratio,
            frozen=sorted(self.frozen(type_key, server_round)),
            controls=self.controls(type_key),
            lesson=lesson,
            discriminant=self.discriminant.of(type_key) if self.discriminant and reads else None,
            class_sums=self.discriminant.requested_min_count(client_id) if self.discriminant else 0,
        )
        return self.transport.message(client_id, request, TRAIN, server_round)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check every update, combine group by group, apply all at once.

        With fewer usable updates than ``server.min_results`` the round is skipped: None, and nothing has changed but
        who is counted and benched.
        """
        intake, self._intake = self._intake or self._make_intake(server_round), None
        admitted = admit(self.transport, server_round, replies, intake)
        self._bench(server_round, admitted.candidates)
        if len(admitted.candidates) < self.config.server.min_results:
            return self._skip(server_round, len(admitted.candidates))
        steps: dict[str, Tensors] = {}
        for group in self.state:
            members = [self.part_of(update, group) for update in admitted.updates]
            members = [update for update in members if update.deltas]
            if members:
                steps[group] = self.combine(group, server_round, members)
                where = f"strategy {self.context.name}, round {server_round}"
                check_step(steps[group], self.state[group], where)
        for group, step in steps.items():
            taken = self._optimized(group, step)
            self.state[group] |= {n: self.state[group][n] + d for n, d in taken.items()}
        self.after_aggregate(server_round)
        self.transport.safety.gate.learn(admitted.candidates)
        summary = training_summary(admitted.reports)
        if self.consensus is not None and self.learns_in(server_round):
            summary["predictions"] = self._hear(self.consensus, server_round, admitted.reports)
        if self.discriminant is not None:
            summary["statistics"] = self._hear_classes(
                self.discriminant, server_round, admitted.reports
            )
        self._journal_round(server_round, summary)
        numbers = {key: value for key, value in summary.items() if isinstance(value, float)}
        return self._arrays(), MetricRecord({**numbers, "clients": len(admitted.candidates)})

    def _make_intake(self, server_round: int) -> Intake:
        return Intake(
            self.transport,
            lambda cid: self.asked_of(cid, server_round, self._assignment(server_round, cid)),
        )

    def _hear_classes(
        self, discriminant: PooledClassifier, server_round: int, reports: Sequence[TrainReply]
    ) -> dict[str, Any]:
        """Pool what clients tell of their classes; what is known now, for the journal."""
        before, doubted = discriminant.excluded_types, discriminant.doubted
        known, refused = discriminant.aggregate(reports)
        for client_id in sorted(discriminant.doubted.keys() - doubted):
            share = round(discriminant.doubted[client_id], 3)
            self.transport.event(
                "classes_doubted", round=server_round, client_id=client_id, to=share
            )
        self._refuse(refused, server_round, "class_sums", "class_sums_refused")
        for type_key in sorted(discriminant.excluded_types - before):
            self.transport.event(
                "types_excluded",
                round=server_round,
                type=type_key,
                agreement=round(discriminant.agreements[type_key], 3),
            )
        return known

    def _bench(self, server_round: int, fine: Collection[str]) -> None:
        """Give every client that failed in this round a strike; journal whom it benches."""
        failed = set(self.transport.failed) - set(fine)
        newly = self.transport.safety.cooldown.record(
            server_round, fine, failed, self.roster.learners
        )
        for client_id, until in newly.items():
            self.transport.event("cooldown", round=server_round, client_id=client_id, until=until)

    def _skip(self, server_round: int, usable: int) -> tuple[None, None]:
        needed = self.config.server.min_results
        self.outcome.skipped.append(server_round)
        self.transport.event("skipped", round=server_round, usable=usable, needed=needed)
        return None, None

    def _hear(
        self, consensus: PredictionEnsemble, server_round: int, reports: Sequence[TrainReply]
    ) -> dict[str, Any]:
        heard, refused = consensus.aggregate(server_round, reports, len(self.roster.labels or ()))
        self._refuse(refused, server_round, "predictions", "predictions_refused")
        return heard

    def _refuse(self, refused: Mapping[str, str], server_round: int, what: str, event: str) -> None:
        """Put on record what beside its update is not used of some clients, and why."""
        for client_id, reason in sorted(refused.items()):
            self.transport.safety.gate.count(client_id, what)
            self.transport.refuse(client_id, server_round, reason, event)

    def _optimized(self, group: str, step: Tensors) -> Tensors:
        """The step as the server optimizer takes it."""
        states = self._optimizer_states.setdefault(group, {})
        taken: Tensors = {}
        for name, change in step.items():
            states[name], new = self.optimizer.step(states.get(name, {}), change.astype(np.float64))
            taken[name] = new.astype(np.float32)
        return taken

    def part_of(self, update: ClientUpdate, group: str) -> ClientUpdate:
        """The tensors of an update that belong to a group."""
        groups = self._groups[update.type_key]
        return update.only(name for name in update.deltas if groups[name] == group)

    def _trained_by(self, client_id: str, server_round: int) -> list[str]:
        """Names of the shared tensors a client trains: from its lowest trained slot on, but for the frozen."""
        info = self.roster.clients[client_id].info
        held = self.frozen(info.type_key, server_round)
        names = self._groups[info.type_key]
        return [n for n in names if slot_of(n) >= info.lowest_slot and n not in held]

    def asked_of(self, client_id: str, server_round: int, assignment: Assignment) -> Asked:
        """Against what a client's answer is checked."""
        train, info = self.config.train, self.roster.clients[client_id].info
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
                assignment.examples, assignment.steps, assignment.learning_rate,
                train.optimizer, train.clip_norm, train.warmup_ratio, pull.MOST * self.roster.usual_examples,
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
        """Ask for tests as :mod:`..federation.evaluation` plans them (all models are equal before round 1)."""
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
        for client_id, scopes in asked.items():
            digest, maps = self.transport.maps_for(client_id)
            header = self._header(server_round, client_id)
            type_key = self.roster.clients[client_id].info.type_key
            added = self.discriminant.of(type_key) if self.discriminant else None
            tensors = self.outgoing(client_id)
            request = EvaluateRequest(header, tensors, digest, maps, scopes, added)
            messages.append(self.transport.message(client_id, request, EVALUATE, server_round))
        return messages

    def _evaluate(self, server_round: int, grid: Grid, result: Result) -> None:
        """Evaluate once; where a type's speaker fails, its other clients are asked in turn."""
        arrays, config = self._arrays(), ConfigRecord()
        messages = list(self.configure_evaluate(server_round, arrays, config, grid))
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
        for server_round in range(done + 1, self.rounds + 1):
            messages = list(
                self.configure_train(
                    server_round, self._arrays(), train_config or ConfigRecord(), grid
                )
            )
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
                central = evaluate_fn(server_round, self._arrays())
                if central is not None:
                    result.evaluate_metrics_serverapp[server_round] = central
        result.arrays = self._arrays()
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

    def _header(self, server_round: int, client_id: str) -> Header:
        method = self.client_method(client_id)
        return Header(self.context.experiment, self.context.seed, method, server_round)

    def _arrays(self) -> ArrayRecord:
        return pack(self.shared_tensors(), "fp32")
