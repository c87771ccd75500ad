"""Makes DeMA a PEFT method: the one place that touches PEFT's private registry.

PEFT's ``register_peft_method`` is public, but it only accepts names of the closed enum ``PeftType``. The
member is added here, once, for the PEFT versions this was tested with; ``tests/dema/test_peft.py`` is the
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


def _add_member() -> PeftType:
    """Add ``PeftType.DEMA`` (a str enum: value equals name), or return the one that is there."""
    name = NAME.upper()
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = name
        member._value_ = name
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
        PeftType._member_names_.append(name)
        type.__setattr__(PeftType, name, member)
    return PeftType(name)


@functools.cache
def register() -> PeftType:
    """Register the tuner with PEFT (idempotent) and return its PEFT type.

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
    member = _add_member()
    from heterotune_flwr.dema.config import DeMAConfig
    from heterotune_flwr.dema.model import DeMAModel

    register_peft_method(name=NAME, config_cls=DeMAConfig, model_cls=DeMAModel)
    return member
