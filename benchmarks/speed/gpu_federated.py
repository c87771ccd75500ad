"""A federated run end to end on one GPU: seconds and memory of a client-round, bytes, and whether the CPU agrees.

Run by ``python -m benchmarks.speed.gpu --federated``, whose help says what is measured.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.deployment.runs import final_bank
from benchmarks.runner import by_client, flower_run, read_results, say, table, write_results
from benchmarks.speed.client_processes import ClientProcesses, environment, weights_gb
from benchmarks.speed.federated_run import (
    FULL,
    ROUNDS,
    ROWS,
    TOY,
    Size,
    aggregation_difference,
    checkpoints,
    configuration,
    flat,
    long_examples,
    measure,
)
from heterotune_flwr.backbones.assets import CACHE_ENVIRONMENT
from heterotune_flwr.exchange.packing import Tensors

RESULTS = "gpu_federated"
#: Bits of the federated runs, and after each of them the embedded family: as it ships, then with all types at 32 bits.
PLAN = {"nf4": None, "bf16": "fp32"}
#: Largest difference of final accuracies at which a GPU's run still equals the CPU's: mean over clients, in points.
SAME_POINTS = 1.0


class Benchmark:
    """Cells that are measured where they are not yet; each is kept at once, unless it is a toy's."""

    def __init__(self, size: Size, folder: Path, device: str, minutes: float) -> None:
        self.size, self.folder, self.device = size, folder, device
        self._keeps = size is FULL
        self._end = time.monotonic() + 60 * minutes
        about = torch.cuda.get_device_name() if device == "cuda" else device
        self.found: dict[str, Any] = read_results(RESULTS) if self._keeps else {}
        if self.found.get("device", about) != about:
            raise SystemExit(
                f"{RESULTS}.json holds numbers of {self.found['device']}; remove it first"
            )
        self.found |= {"device": about, "torch": torch.__version__, "rounds": size.rounds, "length": size.length,
                       "steps": size.steps, "batch": size.batch}  # fmt: skip
        #: Cells that were not measured, and why.
        self.left: list[str] = []

    def has(self, part: str, name: str) -> bool:
        """Whether a cell is there."""
        return name in self.found.get(part, {})

    def take(self, part: str, name: str, value: Any) -> None:
        """Keep a cell."""
        self.found.setdefault(part, {})[name] = value
        if self._keeps:
            write_results(RESULTS, self.found)

    def does(self, name: str, work: Callable[[], None]) -> bool:
        """Do a cell's work where there is time; an error is told, and the next cell is tried."""
        if (remaining := self._end - time.monotonic()) <= 0:
            self.left.append(f"{name} (no time)")
            return False
        say(f"{name} ({remaining / 60:.1f} minutes left)")
        try:
            work()
        except Exception as error:  # whatever one cell dies of, the others are worth their minutes
            say(f"  failed: {type(error).__name__}: {error}")
            self.left.append(f"{name} (failed)")
            return False
        return True

    # -------------------------------------------------------------------------------- runs with random weights

    def runs(self, bits: str) -> None:
        """All rows at one bit width. The clients' processes stay, so that their backbones are loaded once."""
        rows = [row for row in ROWS if not self.has("runs", f"{bits}.{row}")]
        if not rows:
            return
        with ExitStack() as stack:
            loaded = self.does(f"{bits}: weights", partial(self._load, stack, bits))
            for row in rows if loaded else ():
                self.does(f"{bits}: {row}", partial(self._run, bits, row))

    def _load(self, stack: ExitStack, bits: str) -> None:
        cache = self.folder / "cache"
        stack.enter_context(environment({CACHE_ENVIRONMENT: str(cache)}))
        self._models = checkpoints(self.size, self.folder, self.device)
        self._files = long_examples(self.size, self.folder)
        self._clients = stack.enter_context(ClientProcesses(len(self._models), self.device, cache))
        given = [(str(model), bits) for model in self._models]
        sizes = self._clients.each(weights_gb, *given)
        told = {model.name: round(gb, 3) for model, gb in zip(self._models, sizes, strict=True)}
        self.take("weights_gb", bits, told)

    def _run(self, bits: str, row: str) -> None:
        self._clients.clean()
        place = Path(tempfile.mkdtemp(prefix="run-", dir=self.folder)) / "run"
        config = configuration(row, bits, self.size, self._models, self._files, place)
        costs, replies = measure(config, self._clients)
        say(shown(costs))
        if row == next(iter(ROWS)):
            self.take("aggregation", bits, aggregation_difference(replies, self.device))
        self.take("runs", f"{bits}.{row}", costs)

    # -------------------------------------------------------------------------------- the embedded family

    def embedded(self, bits: str | None) -> None:
        """The demonstration, ``bits``: of all types, None: as they ship."""
        name = bits or "shipped"
        if not self.has("embedded", name):
            self.does(f"embedded family, {name}", partial(self._embedded, name, bits))

    def _embedded(self, name: str, bits: str | None) -> None:
        found = differences(
            *(demonstration(bits, device, self.folder) for device in ("cpu", "cuda"))
        )
        say(f"  {found}")
        self.take("embedded", name, found)


def demonstration(bits: str | None, device: str, folder: Path) -> tuple[dict[str, Any], Tensors]:
    """``heterotune run demo``, HeteroTune alone and with fewer anchors, on a device: its results and its bank.

    Caches are apart, so that nothing that one device has computed is used on the other.
    """
    words = [
        f"server.rounds={ROUNDS}",
        "server.take_home=false",
        "run.compare=[heterotune]",
        "run.workers=3",
        "alignment.count=1500",
    ]
    words += [f"types.{number}.bits={bits}" for number in range(3) if bits]
    own = {CACHE_ENVIRONMENT: str(folder / f"cache-{device}")}
    if device == "cpu":
        own["CUDA_VISIBLE_DEVICES"] = ""
    with environment(own):
        place = Path(tempfile.mkdtemp(prefix=f"demo-{device}-", dir=folder)) / "run"
        results = flower_run("demo", words, place)
    return results, final_bank(place)


def differences(
    cpu: tuple[Mapping[str, Any], Tensors], gpu: tuple[Mapping[str, Any], Tensors]
) -> dict[str, Any]:
    """How far two runs are apart: final accuracies (points, by client), and banks (of the CPU's norm)."""
    one, other = (by_client(results, "heterotune") for results, _ in (cpu, gpu))
    apart = [abs(one[key] - other[key]) for key in one]
    names = sorted(cpu[1])
    bank, beside = (flat(tensors, names) for _, tensors in (cpu, gpu))
    return {
        "accuracy_cpu": round(statistics.fmean(one.values()), 2),
        "accuracy_gpu": round(statistics.fmean(other.values()), 2),
        "mean_points": round(statistics.fmean(apart), 2),
        "largest_points": round(max(apart), 2),
        "bank": float(f"{float((bank - beside).norm() / bank.norm()):.3g}"),
        "same": statistics.fmean(apart) <= SAME_POINTS,
    }


def shown(costs: Mapping[str, Mapping[str, Any]]) -> str:
    """A run's costs as a table."""
    head = ("type", "seconds of rounds", "peak GB", "kB down", "kB up")
    return table(
        head,
        [
            (
                name,
                " / ".join(map(str, row["seconds"])),
                row["peak_gb"],
                row["kb_down"],
                row["kb_up"],
            )
            for name, row in costs.items()
        ],
    )


def federated(
    toy: bool, folder: Path | None = None, minutes: float = 12.0, bits: Sequence[str] = tuple(PLAN)
) -> Benchmark:
    """Measure, the most important cells first; ``folder`` keeps checkpoints for a further call (None: nothing)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not toy:
        raise SystemExit("the models are for an NVIDIA GPU, and PyTorch sees none here; add --toy")
    with ExitStack() as stack:
        place = folder or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="heterotune-gpu-"))
        )
        place.mkdir(parents=True, exist_ok=True)
        benchmark = Benchmark(TOY if toy else FULL, place.resolve(), device, minutes)
        for width in bits:
            benchmark.runs(width)
            if device == "cuda":
                benchmark.embedded(PLAN[width])
    if benchmark.left:
        say(f"not measured: {', '.join(benchmark.left)}; the same command goes on")
    return benchmark
