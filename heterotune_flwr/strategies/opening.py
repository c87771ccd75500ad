"""What happens before a strategy's first round: who takes part, the maps, the channels, the groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from heterotune_flwr.alignment.maps import resolve_output
from heterotune_flwr.channels.channel import RunFacts, ServerChannel, server_half
from heterotune_flwr.cmga import pull
from heterotune_flwr.data.symbols import NO_SYMBOLS
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.federation.transport import Transport
from heterotune_flwr.flower import is_simulation
from heterotune_flwr.schema import TrainConfig
from heterotune_flwr.strategies.groups import Groups

if TYPE_CHECKING:
    from heterotune_flwr.strategies.strategy import HeteroStrategy

#: Why nobody can learn from others' predictions.
NO_TEACHER = "it lives on a channel that clients learn from, and none can work here"


def closed_task(labels: Sequence[str] | None, train: TrainConfig) -> bool:
    """Whether a task is about a closed label set."""
    return bool(labels) and train.loss != "tokens"


def open_run(strategy: HeteroStrategy) -> None:
    """Describe the clients, get the maps, open the channels, lay out the groups and their first values."""
    context, session, seed = strategy.context, strategy.context.session, strategy.context.seed
    strategy.roster = session.roster(strategy.method, strategy.config.train, seed)
    _check_who_came(strategy)
    labels = strategy.roster.labels
    closed = list(labels or ()) if closed_task(labels, strategy.config.train) else []
    strategy.method = resolve_output(strategy.method, strategy.config.alignment, labels)
    halves = [server_half(name)(options) for name, options in context.channels.items()]
    if session.config.alignment.output == "vocabulary":
        _find_symbols(strategy)
    if strategy.method.kind == "dema":
        _align(strategy, any(half.reads_views(closed) for half in halves))
    strategy.transport = Transport(context, strategy.roster, strategy.maps, strategy.symbols)
    _tell_of_weights(strategy)
    strategy.groups = Groups(
        {key: strategy.roster.shapes(key) for key in strategy.roster.type_keys},
        strategy.scope,
        seed,
    )
    strategy.channels = _opened(strategy, halves, closed)


def _find_symbols(strategy: HeteroStrategy) -> None:
    """Find what the vocabularies have in common; types that know too little of it are left out."""
    session, method = strategy.context.session, strategy.method
    least = 2
    if method.kind == "dema":
        least = max(method.output or method.latent, session.config.alignment.output_components)
    strategy.symbols = session.symbols.get(
        strategy.roster, method, strategy.config.train, strategy.context.seed, least
    )
    _leave_out(strategy, strategy.symbols.lost, session.least)


def _leave_out(strategy: HeteroStrategy, lost: Mapping[str, str], needed: int) -> None:
    """Take types from the roster, each with its reason."""
    if lost:
        roster = strategy.roster
        reasons = {cid: why for key, why in lost.items() for cid in roster.of_type(key)}
        strategy.roster = strategy.context.session.without(roster, reasons, needed)


def _align(strategy: HeteroStrategy, views: bool) -> None:
    """Get the maps; further views of a text are aligned where a channel reads them. Types without maps are left out."""
    session = strategy.context.session
    if not views:
        strategy.method = replace(strategy.method, views=[])
    strategy.maps = session.maps.get(
        strategy.roster, strategy.method, strategy.config.train, strategy.context.seed,
        strategy.symbols.symbols if strategy.symbols else NO_SYMBOLS,
    )  # fmt: skip
    needed = session.minimum if strategy.maps.away else session.least
    _leave_out(strategy, strategy.maps.lost, needed)


def _opened(
    strategy: HeteroStrategy, halves: Sequence[ServerChannel], labels: Sequence[str]
) -> list[ServerChannel]:
    """The channels that can work in this run; why the others cannot goes on record."""
    roster, maps = strategy.roster, strategy.maps
    facts = RunFacts(
        config=strategy.config,
        method=strategy.method,
        seed=strategy.context.seed,
        rounds=strategy.rounds,
        clients={cid: client.info for cid, client in roster.clients.items()},
        labels=labels,
        guests=bool(roster.guest_types),
        usual_examples=roster.usual_examples,
        spreads=None if maps is None else maps.spreads,
        shares=strategy.shares,
        symbols=strategy.symbols.symbols if strategy.symbols else NO_SYMBOLS,
        shared=strategy.groups.slice,
    )
    opened, reasons = [], []
    for half in halves:
        if (reason := half.open(facts)) is None:
            opened.append(half)
        else:
            reasons.append(f"{half.name}: {reason}")
            strategy.transport.event("channel_off", channel=half.name, reason=reason)
    if strategy.needs_teacher and not any(half.teaches for half in opened):
        raise ConfigError(
            f"strategy {strategy.context.name}: {NO_TEACHER} ({'; '.join(reasons) or 'none is on'})"
        )
    return opened


def _check_who_came(strategy: HeteroStrategy) -> None:
    """Leave out types that the strategy cannot work with; where most clients are of such, the settings are wrong.

    A client's type is its own word: a single one must not be able to end the run of the others. Types with more
    clients come first, of as many the one with the smallest node id.
    """
    roster, session = strategy.roster, strategy.context.session
    bits = {key: roster.info_of(key).bits for key in roster.type_keys}
    first = {key: min(roster.clients[c].node_id for c in roster.of_type(key)) for key in bits}
    kept: dict[str, str] = {}
    reasons: dict[str, str] = {}
    errors: list[ConfigError] = []
    for key in sorted(first, key=lambda key: (-len(roster.of_type(key)), first[key])):
        try:
            strategy.check_types({**kept, key: bits[key]})
        except ConfigError as error:
            errors.append(error)
            reasons |= dict.fromkeys(roster.of_type(key), str(error))
        else:
            kept[key] = bits[key]
    if errors and (is_simulation(session.grid) or 2 * len(reasons) >= len(roster.clients)):
        raise errors[0]
    if errors:
        strategy.roster = session.without(roster, reasons, session.least)


def _tell_of_weights(strategy: HeteroStrategy) -> None:
    """Put on record who has more examples than one client may count as."""
    roster = strategy.roster
    most = pull.MOST * roster.usual_examples
    declared = {cid: client.info.train_examples for cid, client in roster.clients.items()}
    more = {cid: count for cid, count in declared.items() if count > most}
    if more:
        strategy.transport.event("counted_less", most=most, clients=more)
