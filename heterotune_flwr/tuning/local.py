"""Local training: H optimizer steps on the adapter, on a client's own examples."""

from __future__ import annotations

import gc
import logging
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from heterotune_flwr.backbones.batches import parts_by_length
from heterotune_flwr.channels.predictions.loss import Distillation
from heterotune_flwr.errors import FederationError
from heterotune_flwr.schema import TrainConfig
from heterotune_flwr.tuning.adapters import AttachedAdapter
from heterotune_flwr.tuning.memory import checkpointing, choose_micro_batch, is_out_of_memory
from heterotune_flwr.tuning.states import Rows
from heterotune_flwr.tuning.task import Task
from heterotune_flwr.tuning.terms import GradientTerms, make_optimizer, rate_schedule

log = logging.getLogger(__name__)

#: What a forward and backward pass costs beside its tokens, in tokens: a CPU has little to prepare, a GPU would idle
#: between small passes.
_OVERHEAD_CPU, _OVERHEAD_GPU = 64, 4096


@dataclass(frozen=True)
class TrainReport:
    """What a client's training gave.

    ``loss`` and ``accuracy`` are means over the steps' batches, before each step; of a client without examples
    ``examples`` and ``loss`` are those of the anchors, and there is no accuracy. ``seconds``
    is the time of the steps alone. ``peak_memory_mb`` (MiB): on CPU the process's largest
    resident set so far, everything included; on GPU the largest allocation during these steps.
    """

    examples: int
    steps: int
    loss: float
    accuracy: float | None
    seconds: float
    peak_memory_mb: float
    gate_mass: dict[str, float] = field(default_factory=dict)


def batches(
    count: int, batch_size: int, steps: int, rng: np.random.Generator
) -> Iterator[list[int]]:
    """``steps`` batches that go through all examples in a new random order again and again.

    Every batch has ``min(batch_size, count)`` different examples.
    """
    size = min(batch_size, count)
    queue: list[int] = []
    for _ in range(steps):
        if len(queue) < size:
            rest = set(queue)
            queue += [i for i in rng.permutation(count).tolist() if i not in rest]
        yield queue[:size]
        queue = queue[size:]


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MiB; see :class:`TrainReport`."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


@dataclass
class _Loop:
    """What the steps of one local training share."""

    adapter: AttachedAdapter
    task: Task
    rows: Rows
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    clip_norm: float
    prior: torch.Tensor | None
    micro_batch: int
    terms: GradientTerms
    distillation: Distillation | None
    anchor_batch: int
    most: float = math.inf
    halved: bool = False

    def __post_init__(self) -> None:
        self.totals = torch.zeros(3, device=self.adapter.backbone.device)

    def step(self, chosen: list[int], anchors: list[int]) -> None:
        """One optimizer step; short of memory, once in half as many examples at a time."""
        try:
            totals = self._gradients(chosen, anchors)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            totals = None  # handled outside, where the failed pass's tensors are gone
        if totals is None:
            totals = self._again(chosen, anchors)
        self.terms.add()
        torch.nn.utils.clip_grad_norm_(self.adapter.trained.values(), self.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        self.totals += totals

    def _again(self, chosen: list[int], anchors: list[int]) -> torch.Tensor:
        name, size = self.adapter.backbone.type_key, self.micro_batch
        hint = "lower train.batch_size, use fewer bits, or set train.gradient_checkpointing=true"
        if self.halved or size == 1:
            raise FederationError(
                f"out of memory while training {name}, {size} examples at a time; {hint}"
            )
        self.halved, self.micro_batch = True, size // 2
        log.warning(
            "%s: out of memory with %d examples at a time, now %d", name, size, self.micro_batch
        )
        self._release()
        try:
            return self._gradients(chosen, anchors)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        self._release()
        raise FederationError(
            f"out of memory while training {name}, even {self.micro_batch} examples at a time; {hint}"
        )

    def _release(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self.adapter.backbone.device.type == "cuda":
            torch.cuda.empty_cache()

    def _gradients(self, chosen: list[int], anchors: list[int]) -> torch.Tensor:
        """Gradient of the mean loss over a batch's rows, in parts; returns (mean loss, accuracy, bounded mean loss).

        Without examples the loss is that of the anchors.
        """
        self.optimizer.zero_grad(set_to_none=True)
        totals = torch.zeros_like(self.totals)
        count = self.rows.count(chosen)
        for part in self._parts(self.rows, chosen, self.micro_batch):
            states, targets, owners = self.rows.rows(part)
            losses, correct = self.task.losses(states, targets, self.prior)
            loss = losses.sum() / count
            loss.backward()  # type: ignore[no-untyped-call]
            totals[0] += loss.detach()
            totals[1] += examples_correct(correct, owners, len(part)).sum() / len(chosen)
            totals[2] += losses.detach().clamp(max=self.most).sum() / count
        if self.distillation is not None:
            size = min(self.micro_batch, self.anchor_batch)
            for part in self._parts(self.distillation, anchors, size):
                anchored = self.distillation.losses(self.task, part).sum() / len(anchors)
                anchored.backward()  # type: ignore[no-untyped-call]
                if not chosen:
                    totals[[0, 2]] += anchored.detach()
        return totals

    def _parts(self, of: Rows | Distillation, chosen: list[int], most: int) -> list[list[int]]:
        """Split a batch into passes of similar length: the gradient is the whole batch's."""
        on_cpu = self.adapter.backbone.device.type == "cpu"
        lengths = [of.length(index) for index in chosen]
        found = parts_by_length(lengths, most, _OVERHEAD_CPU if on_cpu else _OVERHEAD_GPU)
        return [[chosen[position] for position in part] for part in found]


def train_local(
    adapter: AttachedAdapter,
    task: Task,
    rows: Rows,
    config: TrainConfig,
    seed: int,
    local_steps: int | None = None,
    learning_rate: float | None = None,
    prior: torch.Tensor | None = None,
    memory_gb: float | None = None,
    corrections: Mapping[str, torch.Tensor] | None = None,
    distillation: Distillation | None = None,
    most: float = math.inf,
    aside: int = 0,
) -> TrainReport:
    """Train the attached adapter in place, from the values it holds.

    Parameters
    ----------
    adapter, task, rows
        The adapter, the loss, and the client's examples (:func:`.states.make_rows`).
    config
        Batch size, optimizer, warm-up, proximal term, clipping, gradient checkpointing; steps and rate where not given.
    seed
        Of the batches and the dropout of private experts; equal seeds give equal results on CPU.
    local_steps, learning_rate
        Override the configuration's.
    prior
        The client's log label frequencies (:meth:`.task.Task.log_prior`), discounted by the loss.
    memory_gb
        What training may use, weights included; batches go through in parts that fit
        (:func:`.memory.choose_micro_batch`), with the gradient of the whole batch.
    corrections
        Added to every gradient, by name of the trained tensor (:class:`.terms.GradientTerms`).
    distillation
        Anchors fitted beside the examples in every step (:mod:`..channels.predictions.loss`), or alone where there are
        no examples; the rate then sinks to nothing over the steps, as no other round follows.
    most
        What a single loss counts for at most in the loss that is reported, in nats; it is trained on as it is.
    aside
        Examples, drawn by ``seed``, that this training leaves out.

    Raises
    ------
    FederationError
        The loss is not finite, or memory ran out twice: nothing should be kept of this training. Or there are neither
        examples nor anchors.

    """
    trained_on = rows
    if not len(rows):
        if distillation is None:
            raise FederationError("there are no examples to train on, and no predictions to fit")
        trained_on = distillation.rows
    steps = config.local_steps if local_steps is None else local_steps
    rate = config.learning_rate if learning_rate is None else learning_rate
    device, checkpoint = adapter.backbone.device, config.gradient_checkpointing
    size = choose_micro_batch(adapter, task, trained_on, config.batch_size, memory_gb, checkpoint)
    optimizer = make_optimizer(adapter.trained, config, rate)
    terms = GradientTerms(adapter.trained, config.proximal, corrections)
    anchor_batch = size
    if distillation is not None:
        anchor_batch = choose_micro_batch(
            adapter, task, distillation.rows, size, memory_gb, checkpoint
        )
    loop = _Loop(
        adapter,
        task,
        rows,
        optimizer,
        rate_schedule(optimizer, config.warmup_ratio * steps, None if len(rows) else steps),
        config.clip_norm,
        prior,
        size,
        terms,
        distillation,
        anchor_batch,
        most,
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    cuda = [device] if device.type == "cuda" else []
    started = time.perf_counter()
    with (
        torch.random.fork_rng(devices=cuda),
        adapter.training(),
        checkpointing(adapter, checkpoint),
        torch.enable_grad(),
    ):
        torch.manual_seed(seed % 2**63)
        rng = np.random.default_rng(seed % 2**63)
        used = rng.permutation(len(rows))[aside:].tolist() if aside else range(len(rows))
        # Else what is drawn of the anchors would choose the examples of later batches.
        public = np.random.default_rng([seed % 2**63, 1]) if aside else rng
        for chosen in batches(len(used), config.batch_size, steps, rng):
            anchors = distillation.draw(config.batch_size, public) if distillation else []
            loop.step([used[index] for index in chosen], anchors)
    mean_loss, accuracy, told_loss = (loop.totals / max(steps, 1)).tolist()
    if not math.isfinite(mean_loss):
        raise FederationError(
            f"local training on {adapter.backbone.type_key} diverged (loss {mean_loss}); lower "
            "train.learning_rate"
        )
    anchors_alone = not len(rows)
    return TrainReport(
        examples=len(distillation.chosen) if anchors_alone and distillation else len(rows),
        steps=steps,
        loss=told_loss,
        accuracy=None if anchors_alone else accuracy,
        seconds=time.perf_counter() - started,
        peak_memory_mb=peak_memory_mb(device),
        gate_mass=adapter.gate_mass(),
    )


def examples_correct(correct: torch.Tensor, owners: torch.Tensor, count: int) -> torch.Tensor:
    """Whether *all* rows of each of ``count`` examples are correct (bool ``count``)."""
    wrong = torch.zeros(count, dtype=torch.long, device=correct.device)
    wrong.index_add_(0, owners, (~correct).long())
    return wrong == 0
