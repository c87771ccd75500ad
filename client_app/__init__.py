"""Flower's door to a client."""
