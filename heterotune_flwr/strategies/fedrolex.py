"""FedRolex: HeteroFL with a window that rolls over the parent."""

from __future__ import annotations

from collections.abc import Sequence

from heterotune_flwr.federation.session import StrategyContext
from heterotune_flwr.strategies.heterofl import RATIOS, HeteroFL


class FedRolex(HeteroFL):
    """FedRolex (arXiv 2212.01548): in round j a slice begins at channel, unit and head ``j - 1`` and goes round.

    So that every entry of the parent is trained, whatever the widths. Between rounds a client's slice is another part
    of the parent; tests after round j are of the slices of round j. The rest, what it supports and refuses included, is
    :class:`.heterofl.HeteroFL`'s, its parameters too; no Scaler unless asked for.
    """

    def __init__(
        self,
        context: StrategyContext,
        ratios: Sequence[float] = RATIOS,
        scaler: bool = False,
    ) -> None:
        super().__init__(context, ratios, scaler)

    def window_of(self, server_round: int) -> int:
        """One further every round."""
        return max(0, server_round - 1)
