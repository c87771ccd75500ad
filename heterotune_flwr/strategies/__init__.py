"""One strategy, one file; :mod:`.base` holds what every heterogeneous strategy shares."""

from heterotune_flwr.strategies.base import HeteroStrategy, Scope
from heterotune_flwr.strategies.build import build_strategy
from heterotune_flwr.strategies.fedit import FedIT
from heterotune_flwr.strategies.heterotune import HeteroTune
from heterotune_flwr.strategies.local_only import LocalOnly
from heterotune_flwr.strategies.updates import ClientUpdate, mean_delta
from heterotune_flwr.strategies.within_type import WithinType

__all__ = [
    "ClientUpdate",
    "FedIT",
    "HeteroStrategy",
    "HeteroTune",
    "LocalOnly",
    "Scope",
    "WithinType",
    "build_strategy",
    "mean_delta",
]
