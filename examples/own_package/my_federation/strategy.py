"""A strategy of one's own: HeteroTune's bank, in which only numbers move on whose direction clients agree."""

import numpy as np

from heterotune_flwr.errors import ConfigError
from heterotune_flwr.strategies import HeteroTune


class Agreement(HeteroTune):
    """The mean over all clients, without the numbers that too few of them would move the same way.

    Parameters
    ----------
    context
        Name, settings, seed and what the run offers.
    agree
        Least share of clients on one side of zero, 0.5 to 1. [share]

    """

    def __init__(self, context, agree=0.7):
        super().__init__(context)
        self.agree = agree

    @classmethod
    def check_options(cls, options):
        """Refuse what is no share, before anything runs."""
        agree = options.get("agree", 0.7)
        if not isinstance(agree, (int, float)) or not 0.5 <= agree <= 1:
            raise ConfigError(f"agree is {agree!r}; give a share from 0.5 to 1")

    def combine(self, group, round, updates):
        """Mean per number, 0 where clients pull apart."""
        step = {}
        for name in updates[0].deltas:
            deltas = np.stack([update.deltas[name] for update in updates])
            one_side = np.abs(np.sign(deltas).mean(axis=0)) >= 2 * self.agree - 1
            step[name] = np.where(one_side, deltas.mean(axis=0), 0).astype(np.float32)
        return step
