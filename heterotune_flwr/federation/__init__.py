"""What happens around a strategy on the server: who takes part, admission, messages, journal, checkpoints, launcher.

Numpy only, and no decision about learning: what is shared and how it is combined is the strategies'.
"""
