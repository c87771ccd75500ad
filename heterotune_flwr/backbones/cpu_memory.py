"""Giving the memory of large tensors back to the system as soon as they are freed.

glibc maps large allocations by themselves, but raises its idea of "large" to whatever was freed last (up to 32 MB):
soon a step's tensors lie in the heap, between each other's holes, and a step's peak is up to twice what its tensors
ever take together. A fixed threshold keeps them apart. What mapping costs in time, huge pages
(``THP_MEM_ALLOC_ENABLE``, set in the package's ``__init__``) give back.
"""

from __future__ import annotations

import ctypes
import functools
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
#: Bytes from which an allocation is mapped by itself.
_MAPPED_FROM = 4 * 2**20
#: Free bytes at the heap's end that are kept: otherwise every small tensor may grow and shrink it.
_KEPT_FREE = 64 * 2**20


@functools.cache
def return_freed_memory() -> bool:
    """Fix glibc's threshold for this process; whether that was possible.

    A threshold the user chose (``MALLOC_MMAP_THRESHOLD_``, ``GLIBC_TUNABLES``) stays; other C libraries are left alone.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or "GLIBC_TUNABLES" in os.environ:
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  (others have a mallopt that means something else)
        set_option = library.mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(
        set_option(_M_MMAP_THRESHOLD, _MAPPED_FROM) and set_option(_M_TRIM_THRESHOLD, _KEPT_FREE)
    )
