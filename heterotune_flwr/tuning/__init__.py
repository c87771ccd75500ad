"""What a client does with its backbone: attach an adapter, train it, generate, evaluate it (needs torch).

Nothing of messages and of other clients; what the server sent arrives here as plain tensors and settings.
"""
