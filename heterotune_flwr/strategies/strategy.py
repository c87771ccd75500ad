"""What every heterogeneous strategy shares: the round, and what a strategy may decide in it.

Write an own strategy by subclassing :class:`HeteroStrategy` and overriding one method,

* :meth:`HeteroStrategy.scope`: which tensors are shared with whom, or
* :meth:`HeteroStrategy.combine`: how the updates of one group become one step,

and name it in YAML: ``strategies: {mine: {_component_: my_package.Mine}}``. The class is imported
by the server only; a client never imports what came over the network.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from heterotune_flwr.exchange.packing import Tensors, pack
from heterotune_flwr.federation.admission import Admitted, Intake, admit, read_evaluations
from heterotune_flwr.federation.sampling import sample_clients
from heterotune_flwr.federation.session import StrategyContext
from heterotune_flwr.federation.updates import ClientUpdate, check_step, training_summary
from heterotune_flwr.flower import (
    ArrayRecord,
    ConfigRecord,
    Grid,
    Message,
    MetricRecord,
    Result,
    Strategy,
)
from heterotune_flwr.protocol.messages import TRAIN
from heterotune_flwr.strategies import books, guests, messages, opening, snapshot, testing
from heterotune_flwr.strategies.decisions import Decisions
from heterotune_flwr.strategies.groups import GLOBAL, Scope

__all__ = ["GLOBAL", "HeteroStrategy", "Scope"]


class HeteroStrategy(Decisions, Strategy):
    """Federated training of different model types: rounds, scopes, bookkeeping.

    The server holds one copy of every *group* of shared tensors: ``global`` for all clients,
    ``type/<key>`` for the clients of one model type. A client receives the slice of its type,
    trains, and returns deltas; what has scope ``client`` never leaves it. What may be overridden stands in
    :class:`.decisions.Decisions`.

    Parameters
    ----------
    context
        Name, configuration, seed, session, channels; see :class:`StrategyContext`.

    """

    def __init__(self, context: StrategyContext) -> None:
        super().__init__(context)
        #: What has seen the answers of the round under way arrive.
        self._intake: Intake | None = None

    def prepare(self, grid: Grid) -> None:
        """Find out who takes part, and make everything ready for round 1 (:mod:`.opening`)."""
        opening.open_run(self)

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
        return messages.train_messages(self, server_round, sampled)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check every update, combine group by group, apply all at once, then let the channels aggregate.

        With fewer usable updates than ``server.min_results`` the round is skipped: None, and nothing has changed but
        who is counted and cooling down.
        """
        admitted = self.admit(server_round, replies)
        if len(admitted.candidates) < self.config.server.min_results:
            books.skip(self, server_round, len(admitted.candidates))
            return None, None
        updates = admitted.updates
        self.groups.apply(
            {
                group: self._step(group, server_round, parts)
                for group, parts in self.groups.divide(updates)
            }
        )
        self.after_aggregate(server_round)
        self.transport.safety.gate.learn(admitted.candidates)
        summary = training_summary(admitted.reports)
        logs = summary["channels"] = {}
        for channel in self.at_work(server_round):
            payloads = admitted.payloads(channel.name)
            aggregated = channel.aggregate(server_round, payloads, updates)
            logs[channel.name] = books.told(self, channel.name, server_round, aggregated)
        books.end_round(self, server_round, summary)
        numbers = {key: value for key, value in summary.items() if isinstance(value, float)}
        return None, MetricRecord({**numbers, "clients": len(admitted.candidates)})

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
            lambda cid: messages.asked_of(
                self, cid, server_round, train, clients[cid].info.train_examples
            ),
        )

    def _step(self, group: str, server_round: int, updates: Sequence[ClientUpdate]) -> Tensors:
        """One group's step as the server optimizer takes it."""
        step = self.combine(group, server_round, updates)
        where = f"strategy {self.context.name}, round {server_round}"
        check_step(step, self.state[group], where)
        states = self._optimizer_states.setdefault(group, {})
        taken: Tensors = {}
        for name, change in step.items():
            new, states[name] = self.optimizer.step(change.astype(np.float64), states.get(name, {}))
            taken[name] = new.astype(np.float32)
        return taken

    # ------------------------------------------------------------------------------------- tests

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask for tests (:mod:`.testing`)."""
        return testing.planned(self, server_round)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Make one row per client and journal the statistics; None when nobody answered."""
        answers = read_evaluations(self.transport, server_round, replies)
        return testing.summarized(self, server_round, answers) if answers else None

    # ---------------------------------------------------------------------------------- the loop

    def summary(self) -> None:
        """Write what is about to run into the journal."""
        books.begin(self)

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
            asked = list(self.configure_train(server_round, ArrayRecord(), settings, grid))
            self._intake = self._make_intake(server_round)
            replies = self.transport.collect(
                grid, asked, TRAIN, server_round, arrived=self._intake.arrived
            )
            _, record = self.aggregate_train(server_round, replies)
            books.check_progress(self, server_round, record is not None)
            snapshot.save(self, server_round, evaluated=False)
            if record is not None:
                result.train_metrics_clientapp[server_round] = record
            self._close(server_round, grid, result)
            if evaluate_fn is not None:
                central = evaluate_fn(server_round, self.arrays())
                if central is not None:
                    result.evaluate_metrics_serverapp[server_round] = central
        result.arrays = self.arrays()
        books.finish(self, time.monotonic() - self.begin)
        return result

    def _close(self, server_round: int, grid: Grid, result: Result) -> None:
        """What follows a round: guests after the last one, and a test where one is due."""
        if server_round == self.rounds:
            guests.teach(self, grid)
        if self._evaluates(server_round):
            testing.test(self, server_round, grid, result)
            snapshot.save(self, server_round, evaluated=True)

    def _evaluates(self, server_round: int) -> bool:
        if server_round == 0:
            return self.config.server.evaluate_before
        every = self.config.server.evaluate_every
        return server_round == self.rounds or (every > 0 and server_round % every == 0)

    def arrays(self) -> ArrayRecord:
        """All shared tensors, as Flower keeps them."""
        return pack(self.shared_tensors(), "fp32")
