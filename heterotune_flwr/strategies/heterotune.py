"""HeteroTune: one bank of experts shared by clients of different backbones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from heterotune_flwr.channels.predictions.server import PredictionOptions
from heterotune_flwr.channels.statistics.server import StatisticsOptions
from heterotune_flwr.cmga import DEFAULT_CHAIN, Member, build_chain, make_updates
from heterotune_flwr.cmga.base import LazyMember
from heterotune_flwr.cmga.robust import RobustMean
from heterotune_flwr.dema.bank import slot_of, tier_of
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.exchange.packing import Tensors
from heterotune_flwr.exchange.spill import Stored
from heterotune_flwr.exchange.trees import State
from heterotune_flwr.federation.session import StrategyContext
from heterotune_flwr.federation.updates import ClientUpdate
from heterotune_flwr.strategies.strategy import GLOBAL, HeteroStrategy, Scope

#: How far from the last shared bank a type may be that is mixed into the others', in medians over types.
_FARTHEST = 2.0


class HeteroTune(HeteroStrategy):
    """HeteroTune (arXiv 2411.16796): DeMA experts in one latent space, aggregated with CMGA.

    Our definition (docs/method.md, sections 2 to 5). Every round:

    1. *update gate* (:mod:`..federation.update_gate`): unreadable, misshapen, non-finite or far too long updates of a
       client are refused and reported, the round goes on without them;
    2. *pseudo-gradients* per slot: ``Delta_i / (steps_i * lr_i)``, comparable between clients that
       did different amounts of work (FedNova, arXiv 2007.07481);
    3. *CMGA*: within-type mean, equal norms, reliability, conflict removal, combination, server
       optimizer, as one chain of small transforms (:mod:`heterotune_flwr.cmga`);
    4. *step*: the direction times the mean ``steps_i * lr_i`` is added to the shared bank;
    5. *consensus* (closed label sets): predictions on public anchors are averaged over all clients, and each client
       fits them beside its own examples in the next round (:mod:`..channels.predictions.server`);
    6. *type phase*: in the last rounds each type goes on with a bank of its own, averaged inside the type. What
       crosses types then is the consensus, and every round a little of the mean of all types' banks (``mixing``):
       first what all models can share, then what suits one model.
    7. *discriminant* (closed label sets): what all clients' classes are in the shared latents, told once and summed
       over types, adds to every model's logits (:mod:`..channels.statistics.server`).

    What one type shares (type experts, cores unless ``method.core_scope`` keeps them on their client, and slots whose
    alignment is below the quality threshold) is averaged inside the type; private experts stay on their client. The
    gate goes where ``method.gate_scope`` says: to everybody by default.

    Parameters
    ----------
    context
        See :class:`StrategyContext`.
    chain
        The CMGA chain as a list of ``{transform: name, option: value}``; null for the default.
    predictions
        Options of :class:`..channels.predictions.server.PredictionOptions`; null for none.
    personalization_phase
        Share of the rounds that the type phase takes, 0 to less than 1, rounded down to whole rounds; the consensus
        is then at work in it alone. 0, or no consensus: there is none, and the consensus is at work in every round.
    mixing
        Share of the mean over types, 0 to 1, that every type's experts take after every round of the type phase; in
        it a type counts as at most twice as far from the last shared bank as the median type.
    statistics
        Options of :class:`..channels.statistics.server.StatisticsOptions`; null for none.

    """

    own_server_step = "has server_opt in its chain; set it there"
    remembered = ("chain_states", "personalized")

    def __init__(
        self,
        context: StrategyContext,
        chain: Sequence[Mapping[str, Any]] | None = None,
        predictions: Mapping[str, Any] | None = None,
        personalization_phase: float = 0.0,
        mixing: float = 0.0,
        statistics: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(context)
        self.personalization_phase = _share(
            "personalization_phase", personalization_phase, below_one=True
        )
        self.mixing = _share("mixing", mixing)
        #: Whether types have gone on with banks of their own.
        self.personalized = False
        self.use_predictions(predictions)
        self.use_statistics(statistics)
        self.chain = build_chain(
            _with_rule(DEFAULT_CHAIN if chain is None else chain, context.mean)
        )
        self.chain_states: dict[int, State] = {}
        self._log: dict[str, Any] = {}

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Build the chain once, and read the consensus' options, for their errors."""
        chain = options.get("chain")
        build_chain(DEFAULT_CHAIN if chain is None else chain)
        PredictionOptions.optional(options.get("predictions"))
        StatisticsOptions.optional(options.get("statistics"))
        _share("personalization_phase", options.get("personalization_phase", 0.0), below_one=True)
        _share("mixing", options.get("mixing", 0.0))

    @property
    def shared_rounds(self) -> int:
        """The last round in which all types share one bank."""
        phase = self.personalization_phase if self.consensus is not None else 0.0
        return self.rounds - int(phase * self.rounds)

    def learns_in(self, server_round: int) -> bool:
        """From the last shared round on: its predictions are what the type phase begins with."""
        return (
            self.personalized
            or self.shared_rounds == self.rounds
            or server_round >= self.shared_rounds
        )

    def begin_round(self, server_round: int) -> None:
        """Give every type its own copy of the shared bank when the type phase begins."""
        if not self.personalized and server_round > self.shared_rounds:
            self.personalized = True
            self.fork_global(self._groups)
            self.transport.event("personalization_phase", round=server_round)

    def load_state_dict(self, state: State) -> None:
        """Go on from :meth:`state_dict`; in the type phase the groups are those of the types."""
        super().load_state_dict(state)
        if self.personalized:
            self.fork_global(self._groups)

    def after_aggregate(self, server_round: int) -> None:
        """In the type phase, move every type's experts a little towards the mean over types."""
        if not self.personalized or not self.mixing or GLOBAL not in self.state:
            return
        experts = [name for name in self.state[GLOBAL] if tier_of(name) == "global"]
        for slot in sorted({slot_of(name) for name in experts}):
            groups = self._sharing_types(slot)
            if len(groups) > 1:
                self._mix([name for name in experts if slot_of(name) == slot], groups)

    def _sharing_types(self, slot: int) -> list[str]:
        """Groups of the types that train a slot and share it."""
        guests = self.roster.guest_types
        keys = [key for key in self._groups if key not in guests and self.shares(key, slot)]
        return [f"type/{key}" for key in keys]

    def for_guests(self) -> Tensors:
        """After a type phase, the mean over the types that went through it."""
        shared = dict(super().for_guests())
        if self.personalized:
            for name in shared:
                groups = [g for g in self._sharing_types(slot_of(name)) if name in self.state[g]]
                if groups:
                    values = np.stack([self.state[group][name] for group in groups])
                    shared[name] = values.mean(axis=0, dtype=np.float64).astype(np.float32)
        return shared

    def _mix(self, names: Sequence[str], groups: Sequence[str]) -> None:
        """Mix one slot; a type that has gone far more than the others counts as far as :data:`_FARTHEST` lets it."""
        shared = self.state[GLOBAL]
        moved = [{n: self.state[group][n] - shared[n] for n in names} for group in groups]
        lengths = [np.sqrt(sum(float(np.square(v).sum()) for v in own.values())) for own in moved]
        farthest = _FARTHEST * float(np.median(lengths))
        scales = [min(1.0, farthest / length) if length > 0 else 1.0 for length in lengths]
        for name in names:
            steps = [scale * own[name] for scale, own in zip(scales, moved, strict=True)]
            mean = shared[name] + np.mean(steps, axis=0)
            for group in groups:
                mixed = (1 - self.mixing) * self.state[group][name] + self.mixing * mean
                self.state[group][name] = mixed.astype(np.float32)

    def scope(self, name: str, type_key: str) -> Scope:
        """Global experts are for all types, as far as the type's slot is aligned."""
        tier = tier_of(name)
        wanted = {
            "global": "global",
            "gate": self.method.gate_scope,
            "type": "type",
            "core": self.method.core_scope,
            "lora": "type",
            "sub": "type",
            "private": "client",
        }[tier]
        if wanted == "global" and not self.shares(type_key, slot_of(name)):
            return "type"
        return wanted  # type: ignore[return-value]

    def combine(self, group: str, round: int, updates: Sequence[ClientUpdate]) -> Tensors:
        """CMGA per slot for what all types share, the weighted mean inside a type."""
        if group != GLOBAL:
            return super().combine(group, round, updates)
        step: Tensors = {}
        known = {name for update in updates for name in update.deltas}
        for slot in sorted({slot_of(name) for name in known}):
            step |= self._align_slot(slot, round, updates)
        return step

    def _align_slot(self, slot: int, round: int, updates: Sequence[ClientUpdate]) -> Tensors:
        """Run the chain on one slot's pseudo-gradients; return the change of its tensors."""
        sharing = [u for u in updates if any(slot_of(name) == slot for name in u.deltas)]
        names = sorted(name for name in sharing[0].deltas if slot_of(name) == slot)
        members = [_member(update, names) for update in sharing]
        length = sum(u.examples * u.path_length for u in sharing) / sum(u.examples for u in sharing)
        state = self.chain_states.get(slot, self.chain.init())
        inputs = make_updates(members, round, self.context.seed)
        self.chain_states[slot], result = self.chain.update(state, inputs)
        self._log[f"slot {slot}"] = dict(result.log)
        step: Tensors = {}
        start = 0
        for name in names:
            shape = sharing[0].deltas[name].shape
            size = int(np.prod(shape))
            part = result.direction[start : start + size].reshape(shape)
            step[name] = (length * part).astype(np.float32)
            start += size
        return step

    def round_log(self) -> dict[str, Any]:
        """What CMGA saw and did in the last round, per slot."""
        log, self._log = self._log, {}
        return {"cmga": log} if log else {}


def _with_rule(chain: Sequence[Mapping[str, Any]], mean: RobustMean) -> Sequence[Mapping[str, Any]]:
    """Let the chain's first step average inside types as the entry's ``robust`` says, unless it has a rule."""
    first = dict(chain[0]) if chain else {}
    if mean.rule == "mean" or "rule" in first or first.get("transform") != "within_type_mean":
        return chain
    return [{**first, **asdict(mean)}, *chain[1:]]


def _share(name: str, value: Any, below_one: bool = False) -> float:
    """Check an option that is a share."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1 or (below_one and value == 1):
        upper = "below 1" if below_one else "1"
        raise ConfigError(f"{name} is {value!r}; a share from 0 to {upper} is needed")
    return float(value)


def _flat(update: ClientUpdate, names: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Some tensors of an update as one float64 vector, in the given order."""
    if isinstance(update.deltas, Stored):
        return update.deltas.only(names).flat().astype(np.float64)
    return np.concatenate([update.deltas[name].astype(np.float64).reshape(-1) for name in names])


def _member(update: ClientUpdate, names: Sequence[str]) -> Member:
    """A client's pseudo-gradient of one slot; read when it is needed where the update is not in memory."""

    def read() -> np.ndarray[Any, np.dtype[np.float64]]:
        vector = _flat(update, names)
        vector /= update.path_length
        return vector

    if isinstance(update.deltas, Stored):
        size = update.deltas.only(names).size
        return LazyMember(update.client_id, update.type_key, update.examples, size, read)
    return Member(update.client_id, update.type_key, read(), update.examples)
