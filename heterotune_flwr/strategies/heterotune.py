"""HeteroTune: one bank of experts shared by clients of different backbones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from heterotune_flwr.channels.channel import ServerChannel
from heterotune_flwr.config.options import check_between
from heterotune_flwr.dema.bank import part_of, slot_of
from heterotune_flwr.exchange.packing import Tensors
from heterotune_flwr.exchange.trees import State
from heterotune_flwr.federation.session import StrategyContext
from heterotune_flwr.federation.updates import ClientUpdate
from heterotune_flwr.strategies.slot_chains import SlotChains
from heterotune_flwr.strategies.strategy import GLOBAL, HeteroStrategy, Scope


class HeteroTune(HeteroStrategy):
    """HeteroTune (arXiv 2411.16796): DeMA experts in one latent space, aggregated with CMGA.

    Our definition (docs/method.md). Every round (:meth:`.HeteroStrategy.aggregate_train`):

    1. the *update gate* refuses what no honest client sends (:mod:`..federation.update_gate`);
    2. what all types share becomes one step by *CMGA*, on pseudo-gradients ``Delta_i / (steps_i * lr_i)`` per slot
       (FedNova, arXiv 2007.07481; :mod:`..cmga`): :meth:`combine`;
    3. what one type shares is averaged inside it: :meth:`scope` says which tensor is whose;
    4. the *channels* aggregate what they were told: what classes look like in the shared latents
       (:mod:`..channels.statistics`), what models predict on public texts (:mod:`..channels.predictions`);
    5. in the last rounds, the *personalization phase*, every type goes on with a bank of its own. What crosses types
       then is what channels teach.

    Parameters
    ----------
    context
        See :class:`StrategyContext`.
    chain
        The CMGA chain as a list of ``{transform: name, option: value}``; null for the default.
    personalization_phase
        Share of the rounds that the phase takes, 0 to less than 1, rounded down to whole rounds; channels that teach
        are at work in it alone. 0, or no such channel: there is no phase, and they are at work in every round. [share]

    """

    own_server_step = "has server_opt in its chain; set it there"
    remembered = ("personalized",)

    def __init__(
        self,
        context: StrategyContext,
        chain: Sequence[Mapping[str, Any]] | None = None,
        personalization_phase: float = 0.0,
    ) -> None:
        super().__init__(context)
        self.personalization_phase = personalization_phase
        #: Whether types have gone on with banks of their own.
        self.personalized = False
        self.cmga = SlotChains(chain, context.mean, context.seed)

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Build the chain once, and read the shares, for their errors."""
        SlotChains(options.get("chain"))
        check_between(
            "personalization_phase", options.get("personalization_phase", 0.0), 0, 1, below=True
        )

    def scope(self, name: str, type_key: str) -> Scope:
        """Experts are for all types, as far as the type's slot is aligned."""
        wanted: dict[str, Any] = {
            "expert": "global",
            "gate": self.method.gate_scope,
            "core": self.method.core_scope,
        }
        found: Scope = wanted.get(part_of(name), "type")
        return "type" if found == "global" and not self.shares(type_key, slot_of(name)) else found

    def combine(self, group: str, round: int, updates: Sequence[ClientUpdate]) -> Tensors:
        """CMGA per slot for what all types share, the weighted mean inside a type."""
        return (
            super().combine(group, round, updates)
            if group != GLOBAL
            else self.cmga.step(round, updates)
        )

    @property
    def shared_rounds(self) -> int:
        """The last round in which all types share one bank."""
        taught = any(channel.teaches for channel in self.channels)
        return (
            self.rounds - int(self.personalization_phase * self.rounds) if taught else self.rounds
        )

    def at_work(self, server_round: int) -> Sequence[ServerChannel]:
        """Channels that teach wait for the last shared round: its predictions are what the phase begins with."""
        if self.shared_rounds == self.rounds or self.personalized:
            return self.channels
        return [
            channel
            for channel in self.channels
            if not channel.teaches or server_round >= self.shared_rounds - channel.rounds_before
        ]

    def begin_round(self, server_round: int) -> None:
        """Give every type its own copy of the shared bank when the personalization phase begins."""
        if not self.personalized and server_round > self.shared_rounds:
            self.personalized = True
            self.groups.fork_global(self.roster.type_keys)
            self.transport.event("personalization_phase", round=server_round)

    def for_guests(self) -> Tensors:
        """After a personalization phase, the mean over the types that went through it."""
        shared = dict(super().for_guests())
        for name in shared if self.personalized else ():
            banks = [bank[name] for bank in self._banks(slot_of(name)) if name in bank]
            if banks:
                mean = np.mean(banks, axis=0, dtype=np.float64)
                shared[name] = np.asarray(mean, np.float32)
        return shared

    def _banks(self, slot: int) -> list[Tensors]:
        """Banks of the types that train a slot and share it."""
        guests = self.roster.guest_types
        keys = [key for key in self.groups.of if key not in guests and self.shares(key, slot)]
        return [self.state[f"type/{key}"] for key in keys]

    def round_log(self) -> dict[str, Any]:
        """What CMGA saw and did in the last round, per slot."""
        log = self.cmga.take_log()
        return {"cmga": log} if log else {}

    def state_dict(self) -> State:
        """The chain's states besides."""
        return {**super().state_dict(), "cmga": self.cmga.states}

    def load_state_dict(self, state: State) -> None:
        """Go on from :meth:`state_dict`; in the personalization phase the groups are those of the types."""
        super().load_state_dict(state)
        self.cmga.states = state["cmga"]
        if self.personalized:
            self.groups.fork_global(self.roster.type_keys)
