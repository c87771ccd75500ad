"""A real deployment: certificates, node keys, start scripts, and the checks of a machine that joins."""
