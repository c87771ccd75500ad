"""The embedded family: its corpus and its pre-training."""
