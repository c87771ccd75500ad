"""Which tensors are shared with whom, and what else a strategy may decide.

:class:`Sharing` holds the server's copy of every *group* of tensors and the methods a strategy overrides;
:class:`.strategy.HeteroStrategy` runs the rounds on top of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from heterotune_flwr.channels.answers.server import AnswerEnsemble
from heterotune_flwr.channels.predictions.record import DistillationRequest
from heterotune_flwr.channels.predictions.server import PredictionEnsemble, PredictionOptions
from heterotune_flwr.channels.statistics.server import (
    PooledClassifier,
    StatisticsOptions,
    without_views,
)
from heterotune_flwr.cmga import pull
from heterotune_flwr.dema.bank import initial_tensors
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.exchange.packing import Tensors
from heterotune_flwr.exchange.trees import State
from heterotune_flwr.federation.outcome import Outcome
from heterotune_flwr.federation.roster import Roster
from heterotune_flwr.federation.session import Maps, StrategyContext
from heterotune_flwr.federation.transport import Transport
from heterotune_flwr.federation.updates import ClientUpdate, mean_delta
from heterotune_flwr.flower import Grid, Strategy, is_simulation
from heterotune_flwr.protocol.messages import resolve_output
from heterotune_flwr.rates import sinking_share
from heterotune_flwr.schema import DataConfig, MethodConfig, TrainConfig, TypeConfig

if TYPE_CHECKING:
    from heterotune_flwr.federation.admission import Intake

Scope = Literal["global", "type", "client", "fixed"]
Shapes = dict[str, tuple[int, ...]]
#: The group of tensors shared by every client; a type's own group is ``type/<type key>``.
GLOBAL = "global"
#: Why there can be no consensus.
OPEN_TEXT = (
    "the task has no closed label set (data.labels, train.loss), and predictions.answers is false"
)


@dataclass(frozen=True)
class Assignment:
    """What one message asks a client to train: steps, rate, the lesson beside its examples, texts in use at most."""

    steps: int
    learning_rate: float
    lesson: DistillationRequest | None
    examples: int


def closed_task(labels: Sequence[str] | None, train: TrainConfig) -> bool:
    """Whether a task is about a closed label set."""
    return bool(labels) and train.loss != "tokens"


def surely_open(data: DataConfig, train: TrainConfig) -> bool:
    """Whether the configuration alone says that the task has no closed label set."""
    return train.loss == "tokens" or (data.labels is None and data.max_labels < 1)


class Sharing(Strategy):
    """One copy of every group of shared tensors: ``global`` for all clients, ``type/<key>`` for those of a type."""

    #: Whether the strategy is nothing without a consensus.
    needs_predictions: ClassVar[bool] = False
    #: Why ``server_optimizer`` is refused; empty where it is not.
    own_server_step: ClassVar[str] = ""
    #: Attributes that later rounds depend on, besides the shared tensors: they go into checkpoints. A subclass names
    #: its own; its bases' are added.
    remembered: ClassVar[tuple[str, ...]] = ("_optimizer_states", "_empty_rounds", "taught")

    def __init__(self, context: StrategyContext) -> None:
        self.context = context
        self.config = context.config
        self.method = context.config.method
        self.rounds = context.config.server.rounds
        self.state: dict[str, Tensors] = {}
        self.outcome = Outcome(context.name, context.seed)
        self.roster: Roster
        self.transport: Transport
        self.maps: Maps | None = None
        self.optimizer = context.optimizer
        self.consensus: PredictionEnsemble | None = None
        self.discriminant: PooledClassifier | None = None
        self._discriminant_options: StatisticsOptions | None = None
        self._groups: dict[str, dict[str, str]] = {}
        self._shapes: dict[str, Shapes] = {}
        self._fixed: dict[str, set[str]] = {}
        self._optimizer_states: dict[str, dict[str, State]] = {}
        self._empty_rounds = 0
        #: What has seen the answers of the round under way arrive.
        self._intake: Intake | None = None
        #: After which round guests were taught; 0: not yet.
        self.taught = 0
        #: When the strategy began (seconds of a clock that only runs forward), an earlier start's time included.
        self.begin = 0.0

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
        return self._fixed[type_key]

    def client_method(self, client_id: str) -> MethodConfig:
        """The adapter of one client, where it differs from the others' (LoRA of another rank)."""
        return self.method

    def client_shapes(self, client_id: str) -> Shapes:
        """Shapes of one client's tensors."""
        return self.roster.shapes(self.roster.clients[client_id].info.type_key)

    def outgoing(self, client_id: str) -> Tensors:
        """What a client is sent: the slice of its type."""
        return self.slice(self.roster.clients[client_id].info.type_key)

    def differ_after(self, server_round: int) -> bool:
        """Whether clients of one type can hold different models after a round; before round 1 they are the backbone."""
        return self.models_differ and server_round > 0

    def row_type(self, client_id: str) -> str:
        """Under which type a client's tests are reported."""
        return self.roster.clients[client_id].info.type_key

    def learning_rate(self, server_round: int) -> float:
        """What clients train at in a round, 1 to T: ``last + (1 - last) (1 + cos(pi (t - 1) / (T - 1))) / 2`` of it.

        Cosine annealing (arXiv 1608.03983) over the rounds; ``last`` is ``train.last_rate``, 1 for a constant rate.
        """
        train, done = self.config.train, (server_round - 1) / max(self.rounds - 1, 1)
        share = train.last_rate + (1 - train.last_rate) * sinking_share(done)
        return train.learning_rate * share

    def controls(self, type_key: str) -> Tensors | None:
        """SCAFFOLD's control variate for clients of a type."""
        return None

    @classmethod
    def check_types(cls, bits: Mapping[str, str]) -> None:
        """Refuse model types (type -> bits) this strategy cannot work with, before anything runs (ConfigError)."""

    @classmethod
    def check_backbones(cls, types: Sequence[TypeConfig], options: Mapping[str, Any]) -> None:
        """Refuse backbones that do not fit the class's options, where a simulated run's files tell (ConfigError)."""

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Refuse wrong values of the class's own options before anything runs (ConfigError)."""

    def use_predictions(self, options: Mapping[str, Any] | None) -> None:
        """Let clients learn from each other's predictions on anchors (call in ``__init__``); null: not."""
        if (found := PredictionOptions.optional(options)) is not None:
            self.consensus = PredictionEnsemble(found, self.config.alignment, self.context.seed)

    def use_statistics(self, options: Mapping[str, Any] | None) -> None:
        """Let all clients' labelled examples speak in closed form (call in ``__init__``); null: not."""
        self._discriminant_options = StatisticsOptions.optional(options)

    def learns_in(self, server_round: int) -> bool:
        """Whether clients are asked for predictions on anchors in a round, and taught, where there is a consensus."""
        return True

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
            self.fork_global(self.roster.guest_types)

    def _remembered(self) -> list[str]:
        return sorted(
            {name for kind in type(self).__mro__ for name in vars(kind).get("remembered", ())}
        )

    # ------------------------------------------------------------------------------------ set-up

    def prepare(self, grid: Grid) -> None:
        """Describe the clients, get the maps, lay out the groups and their first values."""
        session, seed = self.context.session, self.context.seed
        self.roster = session.roster(self.method, seed)
        self._check_who_came()
        self.method = resolve_output(self.method, self.config.alignment, self.roster.labels)
        if self.method.kind == "dema":
            if self._discriminant_options is None or not self._closed:
                self.method = without_views(self.method)
            self.maps = session.maps.get(self.roster, self.method, seed)
            if lost := self.maps.lost:
                needed = session.minimum if self.maps.away else session.least
                reasons = {
                    cid: why for key, why in lost.items() for cid in self.roster.of_type(key)
                }
                self.roster = session.without(self.roster, reasons, needed)
        self.transport = Transport(self.context, self.roster, self.maps)
        self._tell_of_weights()
        self._check_consensus()
        self._prepare_discriminant()
        if self.consensus is not None and self.roster.guest_types:
            self.consensus.closes_after = self.rounds
        shapes: dict[str, Shapes] = {}
        for type_key in self.roster.type_keys:
            self._groups[type_key], self._fixed[type_key] = {}, set()
            for name, shape in self.roster.shapes(type_key).items():
                scope = self.scope(name, type_key)
                if scope in ("client", "fixed"):
                    if scope == "fixed":
                        self._fixed[type_key].add(name)
                    continue
                if scope not in ("global", "type"):
                    known_scopes = ", ".join(get_args(Scope))
                    raise ConfigError(
                        f"strategy {self.context.name}: scope() of {name} is {scope!r}; one of {known_scopes} is needed"
                    )
                group = GLOBAL if scope == "global" else f"type/{type_key}"
                known = shapes.setdefault(group, {}).setdefault(name, shape)
                if known != shape:
                    raise ConfigError(
                        f"{name} is to be shared by all types but {type_key} has it as "
                        f"{list(shape)}, another type as {list(known)}; share it inside types"
                    )
                self._groups[type_key][name] = group
        self._shapes = shapes
        self.state = {group: self.first_values(group) for group in sorted(shapes)}

    def _check_who_came(self) -> None:
        """Leave out types that the strategy cannot work with; where most clients are of such, the settings are wrong.

        A client's type is its own word: a single one must not be able to end the run of the others. Types with more
        clients come first, of as many the one with the smallest node id.
        """
        roster, session = self.roster, self.context.session
        kept: dict[str, str] = {}
        reasons: dict[str, str] = {}
        errors: list[ConfigError] = []
        first = {
            key: min(roster.clients[c].node_id for c in roster.of_type(key))
            for key in roster.type_keys
        }
        for key in sorted(first, key=lambda key: (-len(roster.of_type(key)), first[key])):
            try:
                self.check_types({**kept, key: self._bits(key)})
            except ConfigError as error:
                errors.append(error)
                reasons |= dict.fromkeys(roster.of_type(key), str(error))
            else:
                kept[key] = self._bits(key)
        if errors and (is_simulation(session.grid) or 2 * len(reasons) >= len(roster.clients)):
            raise errors[0]
        if errors:
            self.roster = session.without(roster, reasons, session.least)

    def _tell_of_weights(self) -> None:
        """Put on record who has more examples than one client may count as."""
        most = pull.MOST * self.roster.usual_examples
        declared = {cid: client.info.train_examples for cid, client in self.roster.clients.items()}
        more = {cid: count for cid, count in declared.items() if count > most}
        if more:
            self.transport.event("counted_less", most=most, clients=more)

    @property
    def _closed(self) -> bool:
        """Whether the task has a closed label set."""
        return closed_task(self.roster.labels, self.config.train)

    def _check_consensus(self) -> None:
        """Predictions are over a closed label set: on open text there are answers in words, or no consensus."""
        if self.consensus is None or self._closed:
            return
        if self.consensus.options.answers:
            self.consensus = AnswerEnsemble(self.consensus, self.context.seed)
            return
        if self.needs_predictions:
            raise ConfigError(f"strategy {self.context.name} shares predictions, but {OPEN_TEXT}")
        self.consensus = None
        self.transport.event("consensus_off", reason=OPEN_TEXT)

    def _prepare_discriminant(self) -> None:
        """A discriminant is of a closed label set, in the latents of the last slot; elsewhere there is none."""
        options = self._discriminant_options
        if options is None:
            return
        if not self._closed:
            reason = "the task has no closed label set (data.labels, train.loss)"
        elif self.maps is None:
            reason = f"method.kind={self.method.kind} has no latents that types share"
        elif self.maps.spreads is None:
            reason = "an older program made the run's maps, which does not say how they are scaled"
        else:
            # The last slot's quality and, after it, that of whole texts.
            read = range(self.method.slots - 1, self.method.slots + self.method.text_view)
            keys, weighting = self.roster.type_keys, self.config.alignment.weighting
            apart = {key for key in keys if not all(self.shares(key, place) for place in read)}
            self.discriminant = PooledClassifier(
                options, self.maps.spreads, weighting, self.roster, apart
            )
            return
        self.transport.event("discriminant_off", reason=reason)

    def first_values(self, group: str) -> Tensors:
        """What a group's tensors are before round 1: a function of the run's seed."""
        return initial_tensors(self._shapes[group], self.context.seed)

    def fork_global(self, types: Iterable[str]) -> None:
        """Move every global tensor into the groups of some types, with the value it has unless the type has its own."""
        for type_key in types:
            groups, own = self._groups[type_key], f"type/{type_key}"
            for name in [name for name, group in groups.items() if group == GLOBAL]:
                groups[name] = own
                value = self.state[GLOBAL][name]
                self._shapes.setdefault(own, {})[name] = value.shape
                self.state.setdefault(own, {}).setdefault(name, value)

    def _bits(self, type_key: str) -> str:
        return self.roster.clients[self.roster.of_type(type_key)[0]].info.bits

    @property
    def models_differ(self) -> bool:
        """Whether clients of one type can hold different models (some tensor never leaves them)."""
        return any(
            len(self._groups[type_key]) + len(self._fixed[type_key])
            < len(self.roster.shapes(type_key))
            for type_key in self.roster.type_keys
        )

    def holders(self, group: str, name: str) -> set[str]:
        """Types that work with a group's tensor."""
        return {key for key, groups in self._groups.items() if groups.get(name) == group}

    def slice(self, type_key: str) -> Tensors:
        """All shared tensors a client of this type works with."""
        return {name: self.state[group][name] for name, group in self._groups[type_key].items()}

    def shared_tensors(self) -> Tensors:
        """Every group's tensors as ``<group>/<name>``: what is saved and returned at the end, any discriminant too."""
        shared = {
            f"{group}/{name}": value
            for group, tensors in self.state.items()
            for name, value in tensors.items()
        }
        return shared | (self.discriminant.tensors() if self.discriminant else {})

    def shares(self, type_key: str, slot: int) -> bool:
        """Whether a type's slot is aligned well enough to share across types (METHOD 3.5)."""
        if self.maps is None:
            return False
        if self.config.alignment.control != "none":  # a control must show its damage
            return True
        return self.maps.quality[type_key][slot] >= self.config.alignment.quality_threshold
