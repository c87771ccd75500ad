"""A loss term of one's own: sure answers cost (a confidence penalty, arXiv 1701.06548)."""

from heterotune_flwr.tuning.losses import OnExamples


class ConfidencePenalty(OnExamples):
    """Minus the entropy of the label probabilities, in nats, times a weight."""

    def __init__(self, examples, adapter, weight=0.1):
        super().__init__(examples)
        self.weight = weight

    def loss(self, task, part, batch):
        """What one part adds to the loss of the batch."""
        states, _, _ = self.rows.rows(part)
        logs = task.label_logits(states).log_softmax(-1)
        return self.weight * (logs.exp() * logs).sum() / len(batch)
