"""Federated fine-tuning of different, quantized large language models together (HeteroTune on Flower).

From Python (docs/python.md)::

    import heterotune_flwr as ht

    run = ht.run("demo", rounds=4)
    print(run.results)
    run.model("tiny-a").generate("vim")

The names below are imported on first use: the package alone loads neither torch nor Flower.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heterotune_flwr.errors import HeteroTuneError
    from heterotune_flwr.export.model import Model, load
    from heterotune_flwr.reporting.results import Results, StrategyResults
    from heterotune_flwr.runs import Run, open_run, run

__version__ = "0.1.0"
__all__ = [
    "HeteroTuneError",
    "Model",
    "Results",
    "Run",
    "StrategyResults",
    "load",
    "open_run",
    "run",
]

_MODULES = {
    "HeteroTuneError": "errors",
    "Model": "export.model",
    "Results": "reporting.results",
    "StrategyResults": "reporting.results",
    "load": "export.model",
}

# Read when PyTorch allocates, and oneDNN computes, for the first time: set before anything else is imported.
# oneDNN keeps up to 1024 compiled kernels, one per batch shape, with their buffers: with texts of every length that
# grew to 8 GB beside a 0.5 GB model.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
# Huge pages make mapping a large tensor cheap: see backbones/cpu_memory.py.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def __getattr__(name: str) -> Any:
    """Import one of ``__all__`` from its module."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'runs')}"), name)


def __dir__() -> list[str]:
    """What the module offers, before it is imported too."""
    return sorted({*globals(), *__all__})
