"""One strategy, one file; :mod:`.strategy` holds the round that all share, :mod:`.groups` who shares what.

Numpy only, on the server: sending, checking and saving are :mod:`..federation`'s, never a strategy's.
"""

from heterotune_flwr.federation.updates import ClientUpdate, mean_delta
from heterotune_flwr.strategies.build import build_strategy
from heterotune_flwr.strategies.fed_sb import FedSB
from heterotune_flwr.strategies.fedex_lora import FedExLoRA
from heterotune_flwr.strategies.fedit import FedIT
from heterotune_flwr.strategies.fedmkt import FedMKT
from heterotune_flwr.strategies.fedmosaic import FedMosaic
from heterotune_flwr.strategies.fedrolex import FedRolex
from heterotune_flwr.strategies.ffa_lora import FFALoRA
from heterotune_flwr.strategies.flexlora import FlexLoRA
from heterotune_flwr.strategies.flora import FLoRA
from heterotune_flwr.strategies.flower_inside import FlowerInside
from heterotune_flwr.strategies.heterofl import HeteroFL
from heterotune_flwr.strategies.heterotune import HeteroTune
from heterotune_flwr.strategies.hetlora import HETLoRA
from heterotune_flwr.strategies.local_only import LocalOnly
from heterotune_flwr.strategies.rolora import RoLoRA
from heterotune_flwr.strategies.scaffold import Scaffold
from heterotune_flwr.strategies.strategy import HeteroStrategy, Scope
from heterotune_flwr.strategies.within_type import WithinType

__all__ = [
    "ClientUpdate",
    "FFALoRA",
    "FLoRA",
    "FedExLoRA",
    "FedIT",
    "FedMKT",
    "FedMosaic",
    "FedRolex",
    "FedSB",
    "FlexLoRA",
    "FlowerInside",
    "HETLoRA",
    "HeteroFL",
    "HeteroStrategy",
    "HeteroTune",
    "LocalOnly",
    "RoLoRA",
    "Scaffold",
    "Scope",
    "WithinType",
    "build_strategy",
    "mean_delta",
]
