"""Benchmarks: one command each, writing benchmarks/results."""
