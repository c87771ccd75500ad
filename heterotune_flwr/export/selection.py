"""Which kept record of a run, or of a node, is meant; says what there is where that is not clear."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from heterotune_flwr.errors import ConfigError, ExchangeError
from heterotune_flwr.export.facts import ExportFacts
from heterotune_flwr.export.shared import shared_model
from heterotune_flwr.export.write import check_out, maps_of, write
from heterotune_flwr.fields import nearest
from heterotune_flwr.reporting.measures import load_results, strategies_of, subject_of
from heterotune_flwr.tuning.kept_model import Kept, find_kept

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selection:
    """Kept records that one export is made of: a client's, or those of all clients of a type.

    ``travelled``: bytes for one client in a round, ``up`` and ``down``; empty where they are not known here.
    """

    records: Sequence[Kept]
    whole_type: bool
    travelled: Mapping[str, float]

    @property
    def name(self) -> str:
        """Whose model it is, for people."""
        facts = self.records[0].facts
        whose = f"the clients of {facts.type_key}"
        if not self.whole_type:
            whose = f"{facts.client_id} on {facts.type_key}"
        return f"{whose} (strategy {facts.strategy}, seed {facts.seed})"

    def write(self, out: Path) -> ExportFacts:
        """Write the export folder (errors as :func:`.write.write`; ConfigError: a type's clients share no model)."""
        check_out(out)
        loaded = [record.load() for record in self.records]
        kept = shared_model(loaded) if self.whole_type else loaded[0]
        maps = maps_of(self.records[0].folder.parents[2], loaded[0])
        return write(
            kept,
            None,
            out,
            maps=maps,
            clients=len(loaded),
            whole_type=self.whole_type,
            travelled=self.travelled,
        )


def select_of_run(
    run: Path,
    strategy: str | None = None,
    seed: int | None = None,
    type_key: str | None = None,
    client: str | None = None,
) -> Selection:
    """What is meant of a run directory.

    Parameters
    ----------
    run
        Its directory.
    strategy, seed
        None: the strategy the run is about (HeteroTune, else the last), its smallest seed.
    type_key, client
        One of them, or neither where there is one client only. A type may lack its bits where one alone fits.

    Raises
    ------
    ConfigError
        There are no such records: says what there is, or why there are none.
    FederationError
        It is no run directory, or has no results yet.

    """
    if type_key is not None and client is not None:
        raise ConfigError("give --type or --client, not both")
    results = load_results(run)
    records = _kept_of(run)
    strategies = [name for name in strategies_of(results) if name in _values(records, "strategy")]
    chosen = subject_of(strategies) if strategy is None else strategy
    _check("--strategy", chosen, strategies)
    records = [record for record in records if record.facts.strategy == chosen]
    seeds = _values(records, "seed")
    _check("--seed", seeds[0] if seed is None else seed, seeds)
    records = [r for r in records if r.facts.seed == (seeds[0] if seed is None else seed)]
    travelled = _travelled(results, records[0])
    if type_key is not None:
        type_key = _with_bits(type_key, _values(records, "type_key"))
        of_type = [record for record in records if record.facts.type_key == type_key]
        if len(of_type) == 1:
            only = of_type[0].facts.client_id
            raise ConfigError(
                f"{only} alone kept a model of {type_key}: what the type shares cannot be told from what is that "
                f"client's own; export it with --client {only}"
            )
        return Selection(of_type, True, travelled.get(type_key, {}))
    if client is not None:
        _check("--client", client, _values(records, "client_id"))
        records = [record for record in records if record.facts.client_id == client]
    if len(records) > 1:
        raise ConfigError(
            f"{run} holds the models of {len(records)} clients: choose one with --client, or what a type's share "
            f"with --type. {described(records)}"
        )
    return Selection(records, False, travelled.get(records[0].facts.type_key, {}))


def select_of_node(state_dir: Path, client: str, experiment: str | None = None) -> Selection:
    """A deployed node's own model, from its state-dir alone; ``experiment`` None: of its newest run.

    Raises ConfigError: there is none, or not of this experiment (says which there are); ExchangeError: the one asked
    for is damaged. Other damaged ones are passed over, with a warning.
    """

    def skip(folder: Path, error: ExchangeError) -> None:
        if (folder.parent.name, folder.name) == (experiment, client):
            raise error
        log.warning("%s; it is passed over", error)

    records = find_kept(state_dir, client=client, skip=skip)
    if not records:
        raise ConfigError(
            f"{state_dir} holds no model of {client} yet: a node keeps one when a run has ended for it, unless the run "
            "says server.take_home=false"
        )
    records = sorted(records, key=lambda record: record.saved)
    if experiment is not None:
        _check("--experiment", experiment, _values(records, "experiment"))
        records = [record for record in records if record.facts.experiment == experiment]
    return Selection(records[-1:], False, {})


def described(records: Iterable[Kept]) -> str:
    """What there is, in a line: every type with its clients."""
    types: dict[str, list[str]] = {}
    for record in records:
        types.setdefault(record.facts.type_key, []).append(record.facts.client_id)
    parts = [f"{key}: {_few(clients)}" for key, clients in sorted(types.items())]
    return "There are " + "; ".join(parts)


def _kept_of(run: Path) -> list[Kept]:
    records = find_kept(run)
    if records:
        return records
    raise ConfigError(f"{run} holds no kept models: {_why_none(run)}")


def _why_none(run: Path) -> str:
    try:
        server = (yaml.safe_load((run / "config.yaml").read_text()) or {}).get("server") or {}
    except (OSError, yaml.YAMLError, AttributeError):
        server = {}
    if server.get("take_home") is False:
        return "it ran with server.take_home=false; run it again without"
    if "take_home" not in server:
        return "it is of an older version, which kept none; run it again"
    return (
        "its clients' state has been removed, or no strategy has had its last round and test yet (heterotune status "
        "shows where it stands); a deployed client's lies on its own node: heterotune node export"
    )


def _values(records: Iterable[Kept], name: str) -> list[Any]:
    return sorted({getattr(record.facts, name) for record in records})


def _with_bits(given: str, there: Sequence[str]) -> str:
    """The type that is meant: ``tiny-a`` too, where ``tiny-a@bf16`` is the only one of that name."""
    fitting = [key for key in there if key.partition("@")[0] == given]
    found = fitting[0] if len(fitting) == 1 else given
    _check("--type", found, there)
    return found


def _check(option: str, given: Any, there: Sequence[Any]) -> None:
    if given not in there:
        near = nearest(str(given), [str(one) for one in there])
        raise ConfigError(
            f"{option} is {given!r}; there are {_few([str(one) for one in there])}{near}"
        )


def _few(names: Sequence[str], most: int = 8) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _travelled(results: Mapping[str, Any], record: Kept) -> dict[str, dict[str, float]]:
    """Bytes for a client in a round by type, as the run counted them."""
    facts = record.facts
    for entry in results["runs"]:
        if (entry["strategy"], entry["seed"]) == (facts.strategy, facts.seed):
            types = entry.get("bytes", {}).get("types", {})
            return {
                key: {
                    "up": float(counts["up_per_client_round"]),
                    "down": float(counts["down_per_client_round"]),
                }
                for key, counts in types.items()
            }
    return {}
