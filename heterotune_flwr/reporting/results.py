"""``results.json`` of a run as typed objects: every number that the tables show, and those that they do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from heterotune_flwr.errors import ConfigError, FederationError
from heterotune_flwr.federation.outcome import MEASURES, ClientRow
from heterotune_flwr.fields import nearest
from heterotune_flwr.reporting.measures import (
    OVERALL,
    Spread,
    load_results,
    mean_accuracy,
    paired_gain,
    strategies_of,
    subject_of,
    types_of,
)
from heterotune_flwr.reporting.tables import final_table


@dataclass(frozen=True)
class StrategyResults:
    """One strategy with one seed: an entry of ``runs``, under the names of the file.

    Attributes
    ----------
    strategy, seed
        Which run it is.
    clients, clients_before
        A row per tested client after the last round, and of the untouched models before the first.
    overall, types
        Mean, standard deviation, worst and worst tenth of every measure: over all clients, and by type.
    rounds
        What was noted of every round.
    bytes
        Bytes by direction, and what they are compared with.
    seconds
        Duration of all rounds.
    kept
        How many clients took which model home, and how these do on own tests; empty where nobody chose.

    """

    strategy: str
    seed: int
    clients: tuple[ClientRow, ...]
    clients_before: tuple[ClientRow, ...]
    overall: Mapping[str, float]
    types: Mapping[str, Mapping[str, float]]
    rounds: Sequence[Mapping[str, Any]]
    bytes: Mapping[str, Any]
    seconds: float
    kept: Mapping[str, Any]

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Self:
        """Read an entry of ``runs`` (KeyError, TypeError: it is none)."""
        return cls(
            str(entry["strategy"]),
            int(entry["seed"]),
            tuple(map(ClientRow.from_json, entry["clients"])),
            tuple(map(ClientRow.from_json, entry["clients_before"])),
            entry["overall"],
            entry["types"],
            entry["rounds"],
            entry["bytes"],
            float(entry["seconds"]),
            entry.get("kept", {}),
        )


@dataclass(frozen=True, eq=False)
class Results:
    """What a run measured. Printed, it is the tables that the command shows.

    Attributes
    ----------
    directory
        The run's.
    raw
        The whole of ``results.json``; its ``config`` has every setting.

    """

    directory: Path
    raw: Mapping[str, Any]

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Results of a run directory (FederationError: there are none, or not in this form)."""
        results = cls(directory, load_results(directory))
        try:
            assert results.runs is not None  # every entry is read now, not when somebody asks
        except (KeyError, TypeError, ValueError) as error:
            raise FederationError(
                f"{directory / 'results.json'} is not what this version writes "
                f"({type(error).__name__}: {error})"
            ) from error
        return results

    @cached_property
    def runs(self) -> tuple[StrategyResults, ...]:
        """Every strategy with every seed, in the order in which they ran."""
        return tuple(map(StrategyResults.from_json, self.raw["runs"]))

    @property
    def strategies(self) -> list[str]:
        """Names of the strategies, in the order in which they ran."""
        return strategies_of(self.raw)

    @property
    def types(self) -> list[str]:
        """Model types, sorted."""
        return types_of(self.raw)

    @property
    def seeds(self) -> list[int]:
        """Seeds, sorted."""
        return sorted({run.seed for run in self.runs})

    def of(self, strategy: str | None = None, seed: int | None = None) -> StrategyResults:
        """One strategy (None: HeteroTune, else the last) with one seed (None: the lowest).

        Raises ConfigError: there is no such strategy or seed; names those that there are.
        """
        name = self._strategy(strategy)
        ran = {run.seed: run for run in self.runs if run.strategy == name}
        if (chosen := min(ran) if seed is None else seed) not in ran:
            raise ConfigError(f"{name} did not run with seed {seed} (but with {sorted(ran)})")
        return ran[chosen]

    def mean(
        self,
        measure: str = "global_accuracy",
        *,
        strategy: str | None = None,
        type: str | None = None,
    ) -> float | None:
        """Mean of a measure over clients and seeds, as in the file: accuracy and ROUGE-L from 0 to 1.

        Parameters
        ----------
        measure
            ``global_`` (one test for all) or ``personal_`` (clients' own) and ``accuracy``, ``loss``, ``exact_match``
            or ``rouge_l``.
        strategy, type
            None: HeteroTune (else the last one that ran), and all types.

        Returns
        -------
        None where it was not taken.

        Raises
        ------
        ConfigError
            There is no such measure, strategy or type; names those that there are.

        """
        name, type_key = self._strategy(strategy), self._type(type)
        return _share(mean_accuracy(self.raw, name, type_key, _measure(measure)))

    def gain(
        self,
        over: str,
        measure: str = "global_accuracy",
        *,
        strategy: str | None = None,
        type: str | None = None,
    ) -> float | None:
        """Mean gain of a strategy over another one, paired by client and seed; parameters as :meth:`mean`."""
        name, rival, type_key = self._strategy(strategy), self._strategy(over), self._type(type)
        return _share(paired_gain(self.raw, name, rival, type_key, _measure(measure)))

    def _strategy(self, name: str | None) -> str:
        if not self.strategies:
            raise FederationError(f"{self.directory} holds no finished strategy yet")
        return (
            subject_of(self.strategies) if name is None else _one("strategy", name, self.strategies)
        )

    def type_key(self, name: str) -> str:
        """The type of a name, which may lack its bits (ConfigError: none, or several)."""
        return _one("type", name, self.types)

    def _type(self, name: str | None) -> str:
        return OVERALL if name is None else self.type_key(name)

    def __str__(self) -> str:
        """The tables that end a run."""
        return final_table(self.raw, self.directory)

    __repr__ = __str__


def _share(spread: Spread | None) -> float | None:
    """The mean of a spread in percent, from 0 to 1."""
    return None if spread is None else spread[0] / 100


def _measure(name: str) -> str:
    return _one("measure", name, MEASURES)


def _one(what: str, name: str, known: Sequence[str]) -> str:
    """``name`` if it is known, or the only one whose part before ``@`` it is (ConfigError: neither)."""
    fitting = [name] if name in known else [one for one in known if one.partition("@")[0] == name]
    if len(fitting) == 1:
        return fitting[0]
    near = "" if fitting else nearest(name, known)
    raise ConfigError(
        f"{what} {name!r} {'fits several' if fitting else 'is unknown'}{near} "
        f"(known: {', '.join(known)})"
    )
