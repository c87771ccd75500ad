"""Examples: where they come from, how they are written as prompts, who holds which.

The names below need neither torch nor a tokenizer, so the server can use them too.
"""

from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.partition import ClientData, client_examples, own_examples
from heterotune_flwr.data.sources import global_test, label_set, training_pool

__all__ = [
    "ClientData",
    "Example",
    "client_examples",
    "global_test",
    "label_set",
    "own_examples",
    "training_pool",
]
