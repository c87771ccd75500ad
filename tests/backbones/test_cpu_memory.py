"""Freed tensors leave the process, in a process of its own: the C library's settings cannot be taken back."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

#: Prints how many bytes stay resident of 160 MB of freed tensors that have small ones behind them.
_FREED = """
import sys
import heterotune_flwr
import torch
from heterotune_flwr.backbones.cpu_memory import return_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

if sys.argv[1] == "fixed":
    print(return_freed_memory())
else:
    print(False)
torch.ones(6 * 2**20)  # 24 MB: freed, it raises what glibc takes for large
before = resident()
large, small = [], []
for _ in range(10):
    large.append(torch.ones(4 * 2**20))
    small.append(torch.ones(1000))
large.clear()
print(resident() - before)
"""


def _freed(mode: str, **environment: str) -> tuple[str, int]:
    run = subprocess.run(
        [sys.executable, "-c", _FREED, mode],
        capture_output=True, text=True, timeout=120, env=os.environ | environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    said, resident = run.stdout.split()
    return said, int(resident)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_tensors_leave_the_process():
    said, left = _freed("fixed")
    assert said == "True"
    assert left < 20e6
    _, otherwise = _freed("unfixed")
    assert otherwise > 100e6


def test_a_threshold_the_user_chose_stays():
    said, _ = _freed("fixed", MALLOC_MMAP_THRESHOLD_="1073741824")
    assert said == "False"
