"""Remedy for a third silent bitsandbytes bug on CPU (seen in 0.50.2): wrong 4-bit weights.

4-bit weights are quantized in blocks of 64 over the flattened tensor, but the CPU kernel that
dequantizes them starts a new block with every row. Where the row length is no multiple of the block
size (352, 96, 32 ...), most blocks are scaled by their neighbour's maximum: the relative error of a
normal weight matrix is 0.25 to 0.4 instead of 0.09, without any warning. GPUs are not affected, and
rows of whole blocks (576, 640, 1536 ...) are not either.

The kernel is right when every row is one block, so that is how it is called.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

_KERNELS = ("cdequantize_blockwise_cpu_nf4_", "cdequantize_blockwise_cpu_fp4_")


class _WholeBlocks:
    """The native library, its 4-bit CPU kernels called with rows of whole blocks."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)
        return _by_blocks(function) if name.startswith(_KERNELS) else function


def _by_blocks(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Reshape the (rows, columns) of a kernel call; the memory is contiguous either way."""

    def call(weight: Any, maxima: Any, out: Any, blocksize: Any, rows: Any, columns: Any) -> Any:
        block, total = blocksize.value, rows.value * columns.value
        if columns.value % block == 0:
            return kernel(weight, maxima, out, blocksize, rows, columns)
        shape = (total // block, block) if total % block == 0 else (1, total)
        return kernel(weight, maxima, out, blocksize, *map(ctypes.c_longlong, shape))

    return call


@functools.cache
def apply_dequantize_remedy() -> bool:
    """Put the remedy in place, once per process; False if this bitsandbytes has other kernels."""
    from bitsandbytes.backends.cpu import ops

    library = getattr(ops, "lib", None)
    if library is None or not hasattr(library, f"{_KERNELS[0]}bf16"):
        return False
    ops.lib = _WholeBlocks(library)
    return True
