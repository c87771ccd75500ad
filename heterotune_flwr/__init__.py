"""Federated fine-tuning of different, quantized large language models together (HeteroTune on Flower)."""

__version__ = "0.1.0"
