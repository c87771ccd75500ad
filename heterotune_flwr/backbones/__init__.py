"""Which pre-trained models, from where, at which bits, and how one is loaded, stored and read.

Nothing of adapters, training or messages: a backbone is frozen, and the same for whoever asks. Import its modules.
"""
