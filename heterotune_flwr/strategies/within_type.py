"""WithinType: the same bank, averaged only among clients of the same backbone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from heterotune_flwr.channels.predictions.server import PredictionOptions
from heterotune_flwr.channels.statistics.server import StatisticsOptions
from heterotune_flwr.dema.bank import tier_of
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.federation.session import StrategyContext
from heterotune_flwr.strategies.strategy import HeteroStrategy, Scope


class WithinType(HeteroStrategy):
    """FedAvg (arXiv 1602.05629) of the DeMA bank inside each model type.

    The rival HeteroTune has to beat: equal adapter, equal maps, equal bytes, but one bank per type.
    Everything except private experts (and private cores) has scope ``type``; :meth:`combine` is the base class's
    example-weighted mean.

    Parameters
    ----------
    context
        See :class:`StrategyContext`.
    predictions
        Options of :class:`..channels.predictions.server.PredictionOptions`, its pool_over ``type`` and no other: what
        HeteroTune gains beyond it is not what public texts teach a type by itself. Null for none.
    statistics
        Options of :class:`..channels.statistics.server.StatisticsOptions`, its pool_over ``type`` likewise; null for
        none.

    """

    def __init__(
        self,
        context: StrategyContext,
        predictions: Mapping[str, Any] | None = None,
        statistics: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(context)
        self.use_predictions(_inside("predictions", predictions))
        self.use_statistics(_inside("statistics", statistics))

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Read the options of consensus and discriminant, for their errors."""
        PredictionOptions.optional(_inside("predictions", options.get("predictions")))
        StatisticsOptions.optional(_inside("statistics", options.get("statistics")))

    def scope(self, name: str, type_key: str) -> Scope:
        """Share with the own type only."""
        tier = tier_of(name)
        own = tier == "private" or (tier == "core" and self.method.core_scope == "client")
        return "client" if own else "type"


def _inside(section: str, given: Any) -> Any:
    """Options of a section whose pool_over is the own type, whatever the section's default is."""
    if not isinstance(given, Mapping):
        return given
    if given.get("pool_over") == "all":
        raise ConfigError(f"{section}.pool_over is 'all', but nothing crosses types in WithinType")
    return {"pool_over": "type", **given}
