"""What a client does with its backbone: attach an adapter, train it, evaluate it (needs torch)."""
