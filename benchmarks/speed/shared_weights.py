"""Memory of a backbone's weights in several processes that use the store, over that of one copy.

Every worker is a process of its own: it loads the backbone, runs a forward pass (which touches all
weights) and waits; when all have done so, each reads its own ``/proc/self/smaps``. Counted are

* the proportional set size (PSS) of the mapped weight files, pages a process wrote to included, and
* the private anonymous memory by which a worker exceeds a control process, which did the same with
  the smallest embedded backbone at the same bits and has the backbone's tokenizer: all but the
  weights. The rest still holds more than weights (Python objects, buffers): the ratio is an upper bound.

The cache is a private copy, because pages that strangers map too would count for less.

Run: ``python -m benchmarks.speed.shared_weights [--backbone tiny-c] [--bits nf4 ...] [--runs 5]`` (Linux).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.runner import arguments, say, write_results

WORKERS = 4
BITS = ("nf4", "int8", "bf16")
CONTROL = "tiny-a"
_MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \S+\s*(.*)$")


def measure_self() -> dict[str, int]:
    """Bytes of this process: PSS of mapped weight files, and anonymous memory outside of them."""
    weights, anonymous, name = 0, 0, ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := _MAPPING.match(line):
            name = found.group(1)
            continue
        key, _, value = line.partition(":")
        mapped = name.endswith(".safetensors")
        if mapped and key == "Pss":
            weights += 1024 * int(value.split()[0])
        if not mapped and key == "Anonymous":
            anonymous += 1024 * int(value.split()[0])
    return {"weights": weights, "anonymous": anonymous}


def work(backbone: str, bits: str, tokenizer_of: str) -> None:
    """A worker: load, touch, say so; measure when told, and end when told."""
    import torch
    from transformers import AutoTokenizer

    from heterotune_flwr.backbones.loading import BackboneSpec, load_backbone
    from heterotune_flwr.backbones.sources import resolve_source

    torch.set_num_threads(1)
    loaded = load_backbone(BackboneSpec(backbone, bits), "cpu")
    # The control keeps the tokenizer that the worker's backbone brings, loaded as late.
    tokenizer = loaded.tokenizer
    if tokenizer_of != backbone:
        tokenizer = AutoTokenizer.from_pretrained(resolve_source(tokenizer_of))
    with torch.no_grad():
        loaded.model(torch.arange(3, 67)[None])
        # An embedding reads the rows of its tokens only, where it is not the unembedding too.
        loaded.model.get_input_embeddings().weight.flatten()[::1024].max()
    assert tokenizer is not None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(measure_self()), flush=True)


def _start(*worker: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.speed.shared_weights", "--worker", *worker]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def _answer(process: subprocess.Popen[str], question: str = "") -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    if question:
        process.stdin.write(question + "\n")
        process.stdin.flush()
    answer = process.stdout.readline().strip()
    if not answer:
        raise RuntimeError(f"a worker ended with exit code {process.wait()}")
    return answer


def _together(
    backbone: str, bits: str, count: int, tokenizer_of: str | None = None
) -> list[dict[str, int]]:
    """Start ``count`` workers, wait for all, and let them measure while all are alive."""
    processes = [_start(backbone, bits, tokenizer_of or backbone) for _ in range(count)]
    try:
        for process in processes:
            _answer(process)
        return [json.loads(_answer(process, "measure")) for process in processes]
    finally:
        for process in processes:
            process.communicate()


def bytes_of_one_copy(backbone: str, bits: str) -> int:
    """Bytes of the weight files that are mapped."""
    from heterotune_flwr.backbones.headers import weight_files
    from heterotune_flwr.backbones.loading import BackboneSpec
    from heterotune_flwr.backbones.sources import resolve_source
    from heterotune_flwr.backbones.store import entry_dir, used_in_place

    spec, source = BackboneSpec(backbone, bits), resolve_source(backbone)
    place = source if used_in_place(spec, source) else entry_dir(spec, source, "cpu")
    return sum(path.stat().st_size for path in weight_files(place))


@contextmanager
def private_cache(backbone: str) -> Iterator[None]:
    """Let this process and its children use a new cache that holds a copy of a fetched backbone."""
    from heterotune_flwr.backbones.assets import CACHE_ENVIRONMENT
    from heterotune_flwr.backbones.sources import FETCHABLE, fetched_dir, resolve_source

    before = os.environ.get(CACHE_ENVIRONMENT)
    source = resolve_source(backbone)
    with tempfile.TemporaryDirectory(prefix="heterotune-cache-") as folder:
        os.environ[CACHE_ENVIRONMENT] = folder
        try:
            if backbone in FETCHABLE:
                shutil.copytree(source, fetched_dir(backbone))
            yield
        finally:
            os.environ.pop(CACHE_ENVIRONMENT)
            if before is not None:
                os.environ[CACHE_ENVIRONMENT] = before


def pss_ratio(backbone: str, bits: str, workers: int = WORKERS, runs: int = 5) -> dict[str, Any]:
    """Median ratio of all weights' memory to one copy, over ``runs`` starts of all processes.

    Returns
    -------
    ``ratio`` (median), ``ratios``, ``files_only`` (median without anonymous memory),
    ``anonymous_mb`` (median per worker beyond the control) and ``one_copy_mb``.

    """
    _together(backbone, bits, 1)  # makes the stored copy if it is not there
    copy = bytes_of_one_copy(backbone, bits)
    totals, files, growths = [], [], []
    for _ in range(runs):
        control = _together(CONTROL, bits, 1, tokenizer_of=backbone)[0]
        found = _together(backbone, bits, workers)
        mapped = sum(each["weights"] for each in found)
        growth = [max(0, each["anonymous"] - control["anonymous"]) for each in found]
        totals.append((mapped + sum(growth)) / copy)
        files.append(mapped / copy)
        growths.append(statistics.fmean(growth) / 1e6)
    return {
        "ratio": round(statistics.median(totals), 3),
        "ratios": [round(value, 3) for value in totals],
        "files_only": round(statistics.median(files), 3),
        "anonymous_mb": round(statistics.median(growths), 1),
        "one_copy_mb": round(copy / 1e6, 1),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--backbone", default="smollm2")
    parser.add_argument("--bits", nargs="+", default=list(BITS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(*options.worker)
        return
    found = {}
    with private_cache(options.backbone):
        for bits in options.bits:
            found[bits] = pss_ratio(options.backbone, bits, runs=options.runs)
            say(f"{options.backbone}@{bits}: {json.dumps(found[bits])}")
    if options.backbone != "smollm2":
        return  # a quick check, not the benchmark
    values: dict[str, Any] = {f"pss_ratio_4_workers.{b}": row["ratio"] for b, row in found.items()}
    if "nf4" in found:
        values["pss_ratio_4_workers"] = found["nf4"]["ratio"]
    write_results("memory", {**values, "shared_weights": found})


if __name__ == "__main__":
    main()
