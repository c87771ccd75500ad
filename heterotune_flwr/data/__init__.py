"""Examples: where they come from, how they are written as prompts, who holds which.

No torch, and no model but the tokenizer it is given; nothing here is sent to anybody.
"""

from heterotune_flwr.data.examples import Example

__all__ = ["Example"]
