"""Makes DeMA a PEFT method: the one place that touches PEFT's private registry.

PEFT's ``register_peft_method`` is public, but it only accepts names of the closed enum ``PeftType``. The
member is added here, once, for the PEFT versions this was tested with; ``tests/test_dema_peft.py`` is the
canary that fails when a new PEFT needs another way.
"""

from __future__ import annotations

import functools

import peft
from packaging.version import Version
from peft.utils import PeftType, register_peft_method

from heterotune_flwr.errors import HeteroTuneError

NAME = "dema"
TESTED = (Version("0.21"), Version("0.22"))


def _add_member() -> None:
    """Add ``PeftType.DEMA`` (a str enum: value equals name)."""
    if "DEMA" in PeftType.__members__:
        return
    member = str.__new__(PeftType, "DEMA")
    member._name_ = "DEMA"
    member._value_ = "DEMA"
    PeftType._member_map_["DEMA"] = member
    PeftType._value2member_map_["DEMA"] = member
    PeftType._member_names_.append("DEMA")
    type.__setattr__(PeftType, "DEMA", member)


@functools.cache
def register() -> None:
    """Register the tuner with PEFT (idempotent).

    Raises
    ------
    HeteroTuneError
        This PEFT version was never tested with the tuner.

    """
    version = Version(peft.__version__)
    if not TESTED[0] <= version < TESTED[1]:
        raise HeteroTuneError(
            f"peft {version} is installed; DeMA registers itself with peft >={TESTED[0]},<{TESTED[1]} "
            "only: install such a version"
        )
    _add_member()
    from heterotune_flwr.dema.config import DeMAConfig
    from heterotune_flwr.dema.model import DeMAModel

    register_peft_method(name=NAME, config_cls=DeMAConfig, model_cls=DeMAModel)
