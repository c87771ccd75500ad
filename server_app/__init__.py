"""Flower's door to the server."""
