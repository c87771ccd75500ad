"""Remedy for two silent bitsandbytes bugs on CPUs with AVX512-BF16 (seen in 0.50.2).

There, the first forward pass in ``eval()`` under ``no_grad`` repacks every ``Linear4bit`` in place into a
format without autograd: from then on adapter gradients below it are exactly zero, and ``state_dict()`` may
corrupt the weights. Every train-evaluate-train loop hits it. The repacking only happens when
``bitsandbytes.nn.modules.has_avx512bf16()`` is true, so that function is made to answer False; the
ordinary path costs about the same. ``tests/backbones/test_bnb_cpu.py`` watches that gradients survive an evaluation.
"""

from __future__ import annotations

import functools
import logging

logger = logging.getLogger(__name__)


def _no_avx512bf16() -> bool:
    return False


@functools.cache
def apply_bitsandbytes_cpu_remedy() -> bool:
    """Switch the repacking off, once per process; False if this bitsandbytes has none.

    Call it before a 4-bit model is built: layers ask once, when they are made.
    """
    import bitsandbytes
    from bitsandbytes.nn import modules

    if not hasattr(modules, "has_avx512bf16"):
        logger.info(
            "bitsandbytes %s has no AVX512 repacking to switch off", bitsandbytes.__version__
        )
        return False
    modules.has_avx512bf16 = _no_avx512bf16
    return True
