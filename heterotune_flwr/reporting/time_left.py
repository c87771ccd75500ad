"""How long a run still takes, by what its rounds and tests have taken so far."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from heterotune_flwr.jsons import as_list, as_number, as_whole
from heterotune_flwr.schema import Config

#: Rounds and tests whose pace tells the time left.
_RECENT = 5
#: Models that are tested where clients choose what they take home: bare, alone, federated, that after own rounds.
_MODELS = 4
#: Own rounds of the federated model that are tried.
_OWN_ROUNDS = 2
#: Training alone takes about so much of what a round's training computes (0.3 to 0.5 were measured): no channels.
_ALONE = 0.4


@dataclass(frozen=True)
class Plan:
    """What there is to do in a run.

    Attributes
    ----------
    experiments
        Strategies times seeds.
    evaluate_every
        Rounds between two tests; 0: the last one alone.
    take_home
        Whether every client trains alone once more in the last test.

    """

    experiments: int = 1
    evaluate_every: int = 0
    take_home: bool = False

    @classmethod
    def of(cls, config: Config) -> Plan:
        """The plan of a configured run."""
        server, run = config.server, config.run
        take_home = server.take_home and config.method.kind == "dema"
        return cls(len(run.seeds) * len(run.compare), server.evaluate_every, take_home)

    def tests_between(self, done: int, rounds: int) -> int:
        """Tests after a later round than ``done``, but for the one after the last of ``rounds``."""
        every = self.evaluate_every
        return 0 if every < 1 else max(0, (rounds - 1) // every - done // every)


@dataclass
class TimeLeft:
    """Takes a run's events in order; all times are seconds, those of the events since 1970."""

    plan: Plan = field(default_factory=Plan)
    #: Strategies and seeds that have ended.
    finished: int = 0
    #: Seconds of every strategy and seed that has ended.
    _whole: list[float] = field(default_factory=list)
    #: When the strategy at work began, and its step: a round or a test.
    _began: float | None = None
    _since: float = 0.0
    _round: int = 0
    _of: int = 0
    _tested_last: bool = False
    _testing: bool = False
    _rounds: list[float] = field(default_factory=list)
    _tests: list[float] = field(default_factory=list)
    #: Seconds in which all clients of a round were computing.
    _computing: list[float] = field(default_factory=list)
    _asked: int = 0
    _answered: int = 0

    def take(self, event: Mapping[str, Any]) -> None:
        """Bring up to date; what is malformed is passed over."""
        kind, at = event.get("event"), as_number(event.get("time"))
        if kind == "journal":
            self.finished, self._began = 0, None
        elif kind == "already_finished":
            self.finished += 1
        elif kind == "asked":
            self._asked, self._answered = len(as_list(event.get("asked"))), 0
            self._testing = event.get("message_type") == "evaluate"
        elif kind in ("bytes", "client_failed"):
            self._answered += 1
        elif at is not None:
            self._take_step(str(kind), event, at)

    def _take_step(self, kind: str, event: Mapping[str, Any], at: float) -> None:
        took = max(0.0, at - self._since)
        if kind == "start":
            self._began, self._round, self._of = at, 0, as_whole(event.get("of"))
            self._rounds, self._tests, self._computing = [], [], []
            self._tested_last = False
        elif kind == "resumed":
            self._round = as_whole(event.get("round"))
        elif kind in ("round", "skipped"):
            self._round = as_whole(event.get("round"), self._round)
            self._rounds.append(took)
            self._computing.append(as_number(event.get("client_seconds")) or 0.0)
        elif kind == "evaluate":
            self._tests.append(took)
            self._tested_last = self._round >= self._of
        elif kind == "strategy_end" and self._began is not None:
            self.finished += 1
            self._whole.append(at - self._began)
            self._began = None
        elif kind != "guests":
            return
        self._since, self._asked, self._answered, self._testing = at, 0, 0, False

    def seconds(self, now: float) -> float | None:
        """Seconds to the run's end, None while nobody can tell."""
        others = max(0, self.plan.experiments - self.finished - (self._began is not None))
        if self._began is None:
            usual = others * statistics.fmean(self._whole) if self._whole else 0.0
            # What the next strategy needs first, such as maps, may take far longer than a whole one did.
            return None if others and now - self._since >= usual else usual
        if not self._rounds and self._round < self._of:
            return None
        left = self._left_here(now)
        usual = statistics.fmean(self._whole) if self._whole else now - self._began + left
        return left + others * usual

    def share(self, now: float, began: float) -> float:
        """Share of the time of a run that began then that is over, 0 to 1; 0 while nobody can tell.

        At most the share of strategies and seeds that have begun: later ones may be slower.
        """
        left = self.seconds(now)
        spent = max(now - began, 1e-6)
        begun = self.finished + (self._began is not None)
        most = begun / max(self.plan.experiments, begun, 1)
        return 0.0 if left is None else min(spent / (spent + left), most)

    @property
    def number(self) -> int:
        """The strategy and seed at work, counted from 1; between two of them the one that has ended."""
        at_work = self.finished + (self._began is not None)
        return min(max(at_work, 1), max(self.plan.experiments, 1))

    def _left_here(self, now: float) -> float:
        """Seconds to the end of the strategy at work."""
        if self._tested_last:
            return 0.0
        one_round = statistics.median(self._rounds[-_RECENT:]) if self._rounds else 0.0
        one_test = statistics.median(self._tests[-_RECENT:]) if self._tests else one_round
        last = self._last_test(one_round, one_test)
        between = self.plan.tests_between(self._round, self._of)
        left = max(0, self._of - self._round) * one_round + between * one_test + last
        between_tests = one_test if self._testing else one_round
        usual = last if self._round >= self._of else between_tests
        return max(0.0, left - usual) + self._of_step(usual, max(0.0, now - self._since))

    def _last_test(self, one_round: float, one_test: float) -> float:
        """The last test trains every client alone: all rounds' work anew and own rounds, without messages between."""
        if not self.plan.take_home:
            return one_test
        computing = statistics.median(self._computing) if self._computing else one_round
        return _MODELS * one_test + _ALONE * (self._of + _OWN_ROUNDS) * min(one_round, computing)

    def _of_step(self, usual: float, spent: float) -> float:
        """What is left of the round or test under way, by who has answered so far, else by what is usual."""
        if self._answered >= self._asked or not self._answered:
            return max(0.0, usual - spent)
        return spent * (self._asked - self._answered) / self._answered
