"""CMGA, Cross-Model Gradient Alignment: how the updates of different model types become one step.

Numpy only, and pure: no message, no client and no file is known here.

Our definition (docs/method.md, section 4): the public abstract of HeteroTune (arXiv 2411.16796)
names the mechanism and its purpose, harmonising gradient directions across client models during
aggregation, but not its formula. Here it is a chain of small pure transforms, each usable and
replaceable alone, named in YAML::

    chain:
      - transform: within_type_mean
      - transform: equalise_norms
        decay: 0.9
      - transform: combine
        weights: equal
      - transform: server_opt

A transform is a pair ``(init, update)`` of pure functions, ``update(updates, state) -> (updates,
state)``, as in optax; states are nested dictionaries of numbers, texts and arrays, saved without pickle
(:mod:`heterotune_flwr.exchange.trees`). Rules from the literature stand beside ours in :mod:`.alternatives`.
"""

from heterotune_flwr.cmga.alternatives import aligned_mtl, cagrad, fedmgda_plus, pcgrad, ties
from heterotune_flwr.cmga.base import Member, Transform, Updates, make_updates
from heterotune_flwr.cmga.chain import DEFAULT_CHAIN, GUARDED_CHAIN, MEAN_CHAIN, chain
from heterotune_flwr.cmga.directions import combine, deconflict, min_norm_weights, server_opt
from heterotune_flwr.cmga.read import TRANSFORMS, build_chain
from heterotune_flwr.cmga.robust import RobustMean
from heterotune_flwr.cmga.server_optimizers import ServerOptimizer
from heterotune_flwr.cmga.weights import equalise_norms, weigh_reliability, within_type_mean

__all__ = [
    "DEFAULT_CHAIN",
    "GUARDED_CHAIN",
    "MEAN_CHAIN",
    "TRANSFORMS",
    "Member",
    "RobustMean",
    "ServerOptimizer",
    "Transform",
    "Updates",
    "aligned_mtl",
    "build_chain",
    "cagrad",
    "chain",
    "combine",
    "deconflict",
    "equalise_norms",
    "fedmgda_plus",
    "make_updates",
    "min_norm_weights",
    "pcgrad",
    "server_opt",
    "ties",
    "weigh_reliability",
    "within_type_mean",
]
