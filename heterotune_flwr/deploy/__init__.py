"""A real deployment: certificates, node keys, start scripts, and the checks of a machine that joins.

Prepares and submits runs, and takes no part in one; what is private to a node is never read on the server.
"""
