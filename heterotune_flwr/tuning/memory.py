"""How much memory a training step takes, how many examples fit at once, and batches in passes that fit.

A step's cost is *measured*, on one example, the longest: the most bytes of tensors that exist at the same time
during its forward and backward pass. That holds for any family, bits, slots and with or without
gradient checkpointing, where a formula would have to know them all.
"""

from __future__ import annotations

import gc
import logging
import resource
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from heterotune_flwr.backbones.batches import parts_by_length
from heterotune_flwr.errors import FederationError
from heterotune_flwr.schema import TrainConfig
from heterotune_flwr.tuning.adapters import AttachedAdapter
from heterotune_flwr.tuning.losses import LossTerm
from heterotune_flwr.tuning.states import Rows
from heterotune_flwr.tuning.task import Task

log = logging.getLogger(__name__)

Told = TypeVar("Told")

#: Share of a budget that measured tensors may fill: allocators, kernels' work space and Python need the rest.
_USABLE = 0.9
#: Of a trained float32 number: itself, its gradient, AdamW's two moments.
_TRAINED_BYTES = 16
#: What a forward and backward pass costs beside its tokens, in tokens: a CPU has little to prepare, a GPU would idle
#: between small passes.
_OVERHEAD_CPU, _OVERHEAD_GPU = 64, 4096

#: A term, a part of its batch that is run in one go, and the batch.
Pass = tuple[LossTerm, list[int], list[int]]


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MiB: on CPU the process's largest resident set, on GPU the largest allocation since a reset.

    Of several: :func:`forget_peak`, and the first step that a process measures (:func:`step_cost`).
    """
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def forget_peak(device: torch.device) -> None:
    """Let :func:`peak_memory_mb` of a GPU count from now on; a CPU's peak cannot be forgotten."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts bytes of the storages that operations return: how many live now, and at most (``peak``).

    Tensors that existed before are not counted; memory inside an operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage(), before)
        return result

    def _count(self, storage: torch.UntypedStorage, before: set[int]) -> None:
        key = storage._cdata
        if key in before or key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights and buffers as they lie in memory (quantized ones as such, tied ones once)."""
    storages: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        state = getattr(tensor, "quant_state", None)
        for extra in (
            [state.absmax, getattr(state.state2, "absmax", None)] if state is not None else []
        ):
            if extra is not None:
                storages[extra.data_ptr()] = extra.nbytes
        scale = getattr(tensor, "SCB", None)
        if scale is not None:
            storages[scale.data_ptr()] = scale.nbytes
    return sum(storages.values())


@contextmanager
def checkpointing(adapter: AttachedAdapter, enabled: bool) -> Iterator[None]:
    """Recompute each block's activations in the backward pass instead of keeping them.

    Only the blocks themselves enter training mode, not their parts: dropout stays off.
    """
    if not enabled:
        yield
        return
    model = adapter.backbone.model
    _switch(model, "enable")({"use_reentrant": False})
    # That lets the embeddings' output require a gradient, for reentrant checkpoints: with ours the backward pass would
    # then run down to the first block, whatever is trained, and go on doing so in every later training.
    model.disable_input_require_grads()
    blocks = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    for block in blocks:
        block.training = True
    try:
        yield
    finally:
        for block in blocks:
            block.training = False
        _switch(model, "disable")()


def _switch(model: Any, what: str) -> Callable[..., None]:
    """Transformers' method, under its present name or the one it had before."""
    found: Callable[..., None] = getattr(
        model, f"activation_checkpointing_{what}", None
    ) or getattr(model, f"gradient_checkpointing_{what}")
    return found


@dataclass(frozen=True)
class StepCost:
    """Bytes of a training step: ``fixed`` whatever the batch, and per example of the longest kind."""

    fixed: int
    per_example: int

    def fits(self, budget: int) -> int:
        """How many examples fit at once."""
        return int((_USABLE * budget - self.fixed) // max(1, self.per_example))


def step_cost(adapter: AttachedAdapter, task: Task, rows: Rows, checkpoint: bool) -> StepCost:
    """Measure a step on the longest example; nothing is trained."""
    longest = max(range(len(rows)), key=rows.length)
    device = adapter.backbone.device
    trained = list(adapter.trained.values())

    def step() -> None:
        states, targets, _ = rows.rows([longest])
        losses, _ = task.losses(states, targets)
        torch.autograd.grad(losses.sum(), trained, allow_unused=True)

    with checkpointing(adapter, checkpoint), torch.enable_grad():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            step()
            peak = torch.cuda.max_memory_allocated(device) - before
        else:
            with LiveBytes() as live:
                step()
            peak = live.peak
    fixed = weight_bytes(adapter.model) + _TRAINED_BYTES * sum(p.numel() for p in trained)
    return StepCost(fixed, peak)


#: Explicit per-process memory of measured steps; one per kind of step, not per client.
_costs: dict[tuple[Any, ...], StepCost] = {}


def choose_micro_batch(
    adapter: AttachedAdapter,
    task: Task,
    rows: Rows,
    batch_size: int,
    memory_gb: float | None,
    checkpoint: bool,
) -> int:
    """Examples per forward pass, so that a step stays inside ``memory_gb`` (10^9 bytes, weights included).

    Raises
    ------
    FederationError
        Not even one example fits; says how much is needed.

    """
    size = min(batch_size, len(rows))
    if memory_gb is None:
        return size
    longest = max(rows.length(index) for index in range(len(rows)))
    key = (
        id(adapter),
        repr(adapter.method),  # the id of one that is gone may come back
        id(task),
        adapter.lowest,
        type(rows).__name__,
        longest,
        checkpoint,
    )
    if key not in _costs:
        _costs[key] = step_cost(adapter, task, rows, checkpoint)
    cost = _costs[key]
    fit = min(size, cost.fits(int(memory_gb * 1e9)))
    if fit < 1:
        needed = (cost.fixed + cost.per_example) / _USABLE / 1e9
        raise FederationError(
            f"memory-gb={memory_gb:g} is too little to train {adapter.backbone.type_key}: weights take "
            f"{cost.fixed / 1e9:.2f} GB, one example of {longest} tokens {cost.per_example / 1e9:.2f} GB, so at least "
            f"{needed:.2f} GB is needed; use fewer bits, train.slots=last-1, or train.gradient_checkpointing=true"
        )
    log.info(
        "%s: %d of %d examples at a time: %.2f GB of weights, %.3f GB per example of %d tokens, within %g GB",
        adapter.backbone.type_key, fit, size, cost.fixed / 1e9, cost.per_example / 1e9, longest, memory_gb,
    )  # fmt: skip
    return fit


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or in main memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "out of memory" in text.lower() or "can't allocate memory" in text
    )


class MicroBatches:
    """A step's batches in passes of similar length that fit into memory; their gradients add up to the whole batch's.

    No term's passes are on more examples than the first term's.
    """

    def __init__(
        self,
        adapter: AttachedAdapter,
        task: Task,
        losses: Sequence[LossTerm],
        work: TrainConfig,
        memory_gb: float | None,
    ) -> None:
        def size(term: LossTerm, most: int) -> int:
            checkpoint = work.gradient_checkpointing
            return choose_micro_batch(adapter, task, term.rows, most, memory_gb, checkpoint)

        first, *others = losses
        self._adapter, self._losses = adapter, losses
        self._most = size(first, work.batch_size)
        self._sizes = [self._most, *(size(term, self._most) for term in others)]
        self._halved = False

    def within_memory(
        self, backward: Callable[[Iterator[Pass]], Told], drawn: Sequence[list[int]]
    ) -> Told:
        """Do ``backward`` for what every term has drawn; short of memory, once in half as many examples at a time.

        Raises
        ------
        FederationError
            Memory ran out again.

        """
        try:
            return backward(self._passes(drawn))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        self._halve()  # only here are the failed pass's tensors gone
        try:
            return backward(self._passes(drawn))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        self._release()
        raise self._exhausted(f"even {self._most}")

    def _passes(self, drawn: Sequence[list[int]]) -> Iterator[Pass]:
        on_cpu = self._adapter.backbone.device.type == "cpu"
        overhead = _OVERHEAD_CPU if on_cpu else _OVERHEAD_GPU
        for term, size, batch in zip(self._losses, self._sizes, drawn, strict=True):
            lengths = [term.rows.length(index) for index in batch]
            for part in parts_by_length(lengths, min(size, self._most), overhead):
                yield term, [batch[position] for position in part], batch

    def _halve(self) -> None:
        size, name = self._most, self._adapter.backbone.type_key
        if self._halved or size == 1:
            raise self._exhausted(f"{size}")
        self._halved, self._most = True, size // 2
        log.warning("%s: out of memory with %d examples at a time, now %d", name, size, self._most)
        self._release()

    def _release(self) -> None:
        for parameter in self._adapter.trained.values():
            parameter.grad = None
        gc.collect()
        if self._adapter.backbone.device.type == "cuda":
            torch.cuda.empty_cache()

    def _exhausted(self, how_many: str) -> FederationError:
        return FederationError(
            f"out of memory while training {self._adapter.backbone.type_key}, {how_many} examples at a time; lower "
            "train.batch_size, use fewer bits, or set train.gradient_checkpointing=true"
        )
