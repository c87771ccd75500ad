"""What a strategy holds, and what it may decide: every method here may be overridden, and has a default.

The round, which asks them, is :class:`.strategy.HeteroStrategy`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from heterotune_flwr.channels.channel import ServerChannel
from heterotune_flwr.exchange.packing import Tensors
from heterotune_flwr.exchange.trees import State
from heterotune_flwr.federation.outcome import Outcome
from heterotune_flwr.federation.roster import Roster
from heterotune_flwr.federation.session import Maps, StrategyContext
from heterotune_flwr.federation.symbols_service import Found
from heterotune_flwr.federation.transport import Transport
from heterotune_flwr.federation.updates import ClientUpdate, Shapes, mean_delta
from heterotune_flwr.rates import sinking_share
from heterotune_flwr.schema import MethodConfig, TrainConfig, TypeConfig
from heterotune_flwr.strategies.groups import GLOBAL, Groups, Scope


class Decisions:
    """A strategy's state, who shares what, and how updates become a step.

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
    remembered: ClassVar[tuple[str, ...]] = ("taught", "_optimizer_states", "empty_rounds")

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
        self.symbols: Found | None = None
        self._optimizer_states: dict[str, dict[str, State]] = {}
        #: Rounds in a row without enough usable updates.
        self.empty_rounds = 0
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
        """Whether a type's slot is aligned well enough to share across types (docs/method.md, 3.5)."""
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

    def training(self, server_round: int) -> TrainConfig:
        """The training settings of a round."""
        return replace(self.config.train, learning_rate=self.learning_rate(server_round))
