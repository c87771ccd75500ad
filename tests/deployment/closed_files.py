"""Root reads every file; these tests are about users whom files are closed to."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_VERSION_3 = 0x20080522
_DAC_OVERRIDE, _DAC_READ_SEARCH = 1, 2
_SYS_CAPGET, _SYS_CAPSET = 125, 126
#: Numbers of the two calls where they differ from those of x86-64.
_NUMBERS = {"aarch64": (90, 91)}


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable"))


@contextmanager
def without_override() -> Iterator[None]:
    """Let file modes hold for this thread, if it is root's, as they do for any other user."""
    libc = ctypes.CDLL(None, use_errno=True)
    get, put = _NUMBERS.get(os.uname().machine, (_SYS_CAPGET, _SYS_CAPSET))
    header, before = _Header(_VERSION_3, 0), (_Data * 2)()
    assert libc.syscall(get, ctypes.byref(header), before) == 0
    now = (_Data * 2)()
    ctypes.memmove(now, before, ctypes.sizeof(before))
    now[0].effective &= ~(1 << _DAC_OVERRIDE | 1 << _DAC_READ_SEARCH)
    assert libc.syscall(put, ctypes.byref(header), now) == 0
    try:
        yield
    finally:
        assert libc.syscall(put, ctypes.byref(header), before) == 0
