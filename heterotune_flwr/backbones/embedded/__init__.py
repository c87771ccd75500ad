"""How the embedded family was made: its corpus and its pre-training, to be run by hand.

No run needs what is here; the weights it made are in ``assets/``.
"""
