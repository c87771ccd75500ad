"""Federated fine-tuning of different, quantized large language models together (HeteroTune on Flower)."""

import os

__version__ = "0.1.0"

# Read when PyTorch allocates, and oneDNN computes, for the first time: set before anything else is imported.
# oneDNN keeps up to 1024 compiled kernels, one per batch shape, with their buffers: with texts of every length that
# grew to 8 GB beside a 0.5 GB model.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
# Huge pages make mapping a large tensor cheap: see backbones/cpu_memory.py.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
