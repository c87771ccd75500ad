"""A strategy and a loss term of one's own: strategy.py runs on the server alone, losses.py on clients."""
