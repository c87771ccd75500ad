"""CMGA, Cross-Model Gradient Alignment: how the updates of different model types become one step.

Numpy only, and pure: no message, no client and no file is known here.

Our definition (docs/method.md, section 4): the public abstract of HeteroTune (arXiv 2411.16796)
names the mechanism and its purpose, harmonising gradient directions across client models during
aggregation, but not its formula. Here it is a chain of small pure transforms, each usable and
replaceable alone, named in YAML::

    chain:
      - transform: clip_to_median
      - transform: within_type_mean
      - transform: combine
        weights: equal
      - transform: server_opt

A transform is a pair ``(init, update)`` of pure functions, ``update(updates, state) -> (updates,
state)``, as in optax; states are nested dictionaries of numbers, texts and arrays, saved without pickle
(:mod:`heterotune_flwr.exchange.trees`). Rules about directions, off by default, are in :mod:`.directions`.
"""

from heterotune_flwr.cmga.base import Member, Transform, Updates, make_updates
from heterotune_flwr.cmga.chain import DEFAULT_CHAIN, MEAN_CHAIN, chain
from heterotune_flwr.cmga.clip import clip_to_median
from heterotune_flwr.cmga.combining import combine, server_opt, within_type_mean
from heterotune_flwr.cmga.directions import cagrad, pcgrad
from heterotune_flwr.cmga.read import TRANSFORMS, build_chain
from heterotune_flwr.cmga.robust import RobustMean
from heterotune_flwr.cmga.server_optimizers import ServerOptimizer

__all__ = [
    "DEFAULT_CHAIN",
    "MEAN_CHAIN",
    "TRANSFORMS",
    "Member",
    "RobustMean",
    "ServerOptimizer",
    "Transform",
    "Updates",
    "build_chain",
    "cagrad",
    "chain",
    "clip_to_median",
    "combine",
    "make_updates",
    "pcgrad",
    "server_opt",
    "within_type_mean",
]
