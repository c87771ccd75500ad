"""What libraries say on standard error is kept from those who want to follow a run."""

from __future__ import annotations

import functools
import logging
import os
import warnings

#: Libraries whose warnings are about their own inside, and nobody's to mend here.
_CHATTY = ("bitsandbytes", "datasets", "flwr", "peft", "ray", "torch", "transformers")
#: Those of them that set their own level when they are imported, by these variables.
_VERBOSITY = ("DATASETS_VERBOSITY", "TRANSFORMERS_VERBOSITY")


@functools.cache
def hush() -> None:
    """Silence the warnings of :data:`_CHATTY` in this process; errors are still told."""
    for variable in _VERBOSITY:
        os.environ.setdefault(variable, "error")
    for name in _CHATTY:
        warnings.filterwarnings("ignore", module=rf"{name}(\.|$)")
        logging.getLogger(name).setLevel(logging.ERROR)
