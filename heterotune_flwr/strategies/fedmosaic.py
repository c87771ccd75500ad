"""FedMosaic-style sharing: Co-LoRA's matrices between aligned frozen maps, LoRA inside a type."""

from __future__ import annotations

from dataclasses import replace

from heterotune_flwr.dema.bank import part_of, slot_of
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.federation.session import StrategyContext
from heterotune_flwr.strategies.strategy import HeteroStrategy, Scope


class FedMosaic(HeteroStrategy):
    """After FedMosaic / Co-LoRA (arXiv 2506.11024): ``y = f(x) + U (P (D x + o) + Q)`` with shared P and Q.

    D, o, U are frozen and aligned between the types, so P and Q have one shape and one meaning in every model and are
    averaged over *all* clients, by numbers of examples; the LoRA on the other layers is averaged inside a type
    (``method.core_rank``). A slot of a type that aligns badly shares P and Q inside the type.

    What is ours, not the paper's (of which we know the abstract): D, o, U are those of our alignment, so P is r_out x r
    (r_out = number of labels on a closed set); they act beside the MLP of ``method.slots - 1`` blocks of equal relative
    depth and on the final state; every linear layer has LoRA. Left out: the paper's relevance-guided weights
    (RELA), whose formula we do not know; all clients weigh as their data do. Heterogeneity: any model types, any bits;
    one rank.
    """

    def __init__(self, context: StrategyContext) -> None:
        super().__init__(context)
        if self.method.kind != "dema":
            raise ConfigError(
                f"strategy {context.name} puts its matrices between DeMA's maps but method.kind is "
                f"{self.method.kind!r}; set strategies.{context.name}.method.kind=dema"
            )
        self.method = replace(
            self.method, inner=0, core_kind="lora", gate="uniform", experts_global=1
        )

    def scope(self, name: str, type_key: str) -> Scope:
        """P and Q for all, as far as the slot is aligned; LoRA for the type; a gate over one expert does nothing."""
        part = part_of(name)
        if part == "gate":
            return "fixed"
        if part == "core":
            return "client" if self.method.core_scope == "client" else "type"
        return "global" if self.shares(type_key, slot_of(name)) else "type"
