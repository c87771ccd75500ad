"""Hostile, broken, lost and killed clients and servers, in one process or on one machine."""
