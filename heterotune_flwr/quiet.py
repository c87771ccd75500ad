"""What libraries say on standard error is kept from those who want to follow a run."""

from __future__ import annotations

import functools
import logging
import os
import warnings

#: Libraries whose warnings are about their own inside, and nobody's to mend here.
_CHATTY = ("bitsandbytes", "datasets", "flwr", "peft", "ray", "torch", "transformers")


@functools.cache
def hush() -> None:
    """Silence the warnings of :data:`_CHATTY` in this process; errors are still told."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in _CHATTY:
        warnings.filterwarnings("ignore", module=rf"{name}(\.|$)")
        logging.getLogger(name).setLevel(logging.ERROR)
