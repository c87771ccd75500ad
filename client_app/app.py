"""The Flower ClientApp: one handler per message type of the wire contract. Nothing else."""

from __future__ import annotations

from heterotune_flwr.flower import ClientApp, Context, Message
from heterotune_flwr.worker.door import answer

app = ClientApp()


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """Say who this client is and what it can train."""
    return answer(message, context)


@app.query("align")
def align(message: Message, context: Context) -> Message:
    """Give the public factors of this client's model type."""
    return answer(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train locally and give the deltas."""
    return answer(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measure the model on the global and the client's own test set."""
    return answer(message, context)
