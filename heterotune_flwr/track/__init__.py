"""Trackers: TensorBoard, Weights & Biases and MLflow, as readers of a run's journal.

One thin module for each; none of their packages is imported before a run asks for it.
"""
