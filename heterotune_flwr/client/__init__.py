"""What a node does with a message: who it is, what its owner allows, and the work asked for.

Everything a message says is checked here before work; nothing of the server's side is imported.
"""
