"""Remedies for silent bitsandbytes bugs on CPU (seen in 0.50.2), with tests that watch whether they are still needed.

On CPUs with AVX512-BF16 the first forward pass in ``eval()`` under ``no_grad`` repacks every ``Linear4bit`` in place
into a format without autograd: from then on adapter gradients below it are exactly zero, and ``state_dict()`` may
corrupt the weights. Every train-evaluate-train loop hits it. The repacking only happens when
``bitsandbytes.nn.modules.has_avx512bf16()`` is true, so that function is made to answer False; the ordinary path costs
about the same.

4-bit weights are quantized in blocks of 64 over the flattened tensor, but the CPU kernel that dequantizes them starts a
new block with every row. Where the row length is no multiple of the block size (352, 96, 32 ...), most blocks are
scaled by their neighbour's maximum: the relative error of a normal weight matrix is 0.25 to 0.4 instead of 0.09. GPUs
and rows of whole blocks (576, 640, 1536 ...) are not affected. The kernel is right when every row is one block, so that
is how it is called.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

_KERNELS = ("cdequantize_blockwise_cpu_nf4_", "cdequantize_blockwise_cpu_fp4_")


@functools.cache
def apply_repacking_remedy() -> bool:
    """Switch the repacking off, once per process; False if this bitsandbytes has none.

    Call it before a 4-bit model is built: layers ask once, when they are made.
    """
    import bitsandbytes
    from bitsandbytes.nn import modules

    if not hasattr(modules, "has_avx512bf16"):
        log.info("bitsandbytes %s has no AVX512 repacking to switch off", bitsandbytes.__version__)
        return False
    modules.has_avx512bf16 = lambda: False
    return True


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
