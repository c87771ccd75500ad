"""Final normalised states at the loss positions: recomputed each step, or from what is kept (:mod:`.frozen_states`).

Everything below the lowest trained slot is frozen. With the last slot only, that is the whole
backbone: the final states of a client's examples are computed once, and a training step touches neither the
backbone's weights nor its time. With deeper slots the states that enter the lowest slot's block are kept,
and a step runs the blocks from there on. The numbers are those of the full route: the adapter adds
to a state exactly what its layer adds inside the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from heterotune_flwr.tuning.adapters import AttachedAdapter
from heterotune_flwr.tuning.forward import (
    can_start_at,
    final_states,
    first_block,
    states_from_block,
)
from heterotune_flwr.tuning.frozen_states import frozen_states
from heterotune_flwr.tuning.task import EncodedSet

#: Lines of one pass without gradients.
_LINES = 32


class Rows(Protocol):
    """A set of examples as rows of adapted states, and as losses to be taken; both belong to examples."""

    def __len__(self) -> int:
        """Count the examples."""

    def count(self, indices: Sequence[int]) -> int:
        """Count the losses of some examples."""

    def length(self, index: int) -> int:
        """Count the tokens of an example that a step has to run; 1 where none is run."""

    def rows(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return adapted states ``S x d``, targets ``R``, owners ``R`` (positions in ``indices``).

        A row has a target of its own; but where labels part later than at the prompt's end, an example has one target
        and a state for every place where they part (:meth:`.task.Task.label_logits` takes them so).
        """

    def offsets(self, indices: Sequence[int], prior: Tensor | None = None) -> Tensor | None:
        """Return what is added to the label words' logits of some examples besides ``prior``; None for nothing."""


@dataclass(frozen=True, eq=False)
class _Layout:
    """Where each example's targets lie in a flat table; ``states``: how many states belong to one target."""

    targets: Tensor
    offsets: list[int]
    states: int

    @classmethod
    def of(cls, encoded: EncodedSet, device: torch.device) -> _Layout:
        offsets = [0]
        for targets in encoded.targets:
            offsets.append(offsets[-1] + len(targets))
        flat = [target for targets in encoded.targets for target in targets]
        return cls(
            torch.tensor(flat, dtype=torch.long, device=device), offsets, encoded.states_each
        )

    @property
    def one_each(self) -> bool:
        return self.offsets[-1] == len(self.offsets) - 1

    def count(self, indices: Sequence[int]) -> int:
        return sum(self.offsets[i + 1] - self.offsets[i] for i in indices)

    def select(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return (numbers of flat targets ``R``, owners ``R``) of some examples."""
        device = self.targets.device
        if self.one_each:
            chosen = torch.as_tensor(indices, dtype=torch.long, device=device)
            return chosen, torch.arange(len(indices), device=device)
        rows = [r for i in indices for r in range(self.offsets[i], self.offsets[i + 1])]
        owners = [
            n for n, i in enumerate(indices) for _ in range(self.offsets[i], self.offsets[i + 1])
        ]
        return torch.tensor(rows, device=device), torch.tensor(owners, device=device)

    def of_states(self, chosen: Tensor) -> Tensor:
        """The rows of states that belong to some targets."""
        if self.states == 1:
            return chosen
        return (
            chosen[:, None] * self.states + torch.arange(self.states, device=chosen.device)
        ).flatten()


class _Offset:
    """Rows of a closed label set whose logits have something added, ``n x C``; or nothing."""

    def __init__(self, offsets: Tensor | None) -> None:
        self._offsets = offsets

    def offsets(self, indices: Sequence[int], prior: Tensor | None = None) -> Tensor | None:
        """See :class:`Rows`."""
        if self._offsets is None:
            return prior
        own = self._offsets[torch.as_tensor(indices, device=self._offsets.device)]
        return own if prior is None else own + prior


class FullRows(_Offset):
    """The full route: the whole decoder in every call (LoRA, or nothing frozen below)."""

    def __init__(
        self, adapter: AttachedAdapter, encoded: EncodedSet, offsets: Tensor | None = None
    ) -> None:
        super().__init__(offsets)
        self._adapter = adapter
        self._encoded = encoded
        self._layout = _Layout.of(encoded, adapter.backbone.device)

    def __len__(self) -> int:
        return len(self._encoded)

    def count(self, indices: Sequence[int]) -> int:
        """See :class:`Rows`."""
        return self._layout.count(indices)

    def length(self, index: int) -> int:
        """See :class:`Rows`."""
        lines, _ = self._encoded.lines([index])
        return sum(map(len, lines))

    def rows(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`Rows`."""
        chosen, owners = self._layout.select(indices)
        states = self._states(indices)
        return states, self._layout.targets[chosen], owners

    def _states(self, indices: Sequence[int]) -> Tensor:
        return final_states(self._adapter, self._encoded, indices)


class PrefixRows(FullRows):
    """The middle route: kept states enter the lowest trained slot's block, the blocks above are run."""

    def __init__(
        self,
        adapter: AttachedAdapter,
        encoded: EncodedSet,
        block: int,
        on_disk: bool = True,
        offsets: Tensor | None = None,
    ) -> None:
        super().__init__(adapter, encoded, offsets)
        self._block = block
        self._table = frozen_states(adapter, encoded, block, on_disk)
        self._starts = [0]
        for ids in encoded.by_line.inputs:
            self._starts.append(self._starts[-1] + len(ids))

    def _states(self, indices: Sequence[int]) -> Tensor:
        parts = [self._from_block(part) for part in self._parts(indices)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _parts(self, indices: Sequence[int]) -> list[Sequence[int]]:
        """Some examples in passes: an example of many lines fills one, where no gradient needs them all anyway."""
        if torch.is_grad_enabled() or len(self._encoded.reads) < 2:
            return [indices]
        size = max(1, _LINES // len(self._encoded.reads))
        return [indices[start : start + size] for start in range(0, len(indices), size)]

    def _from_block(self, indices: Sequence[int]) -> Tensor:
        each = max(1, len(self._encoded.reads))
        lines = [line for i in indices for line in range(i * each, (i + 1) * each)]
        inputs = [self._table[self._starts[line] : self._starts[line + 1]] for line in lines]
        return states_from_block(self._adapter, self._encoded, indices, self._block, inputs)


class CachedRows(_Offset):
    """The short route: kept final states through the last slot alone."""

    def __init__(
        self,
        adapter: AttachedAdapter,
        encoded: EncodedSet,
        on_disk: bool = True,
        offsets: Tensor | None = None,
    ) -> None:
        super().__init__(offsets)
        self._adapter = adapter
        self._layout = _Layout.of(encoded, adapter.backbone.device)
        self._states = frozen_states(adapter, encoded, on_disk=on_disk)

    def __len__(self) -> int:
        return len(self._layout.offsets) - 1

    def count(self, indices: Sequence[int]) -> int:
        """See :class:`Rows`."""
        return self._layout.count(indices)

    def length(self, index: int) -> int:
        """See :class:`Rows`."""
        return 1

    def rows(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`Rows`."""
        chosen, owners = self._layout.select(indices)
        rows = self._layout.of_states(chosen)
        states = self._states[rows.to(self._states.device)].to(chosen.device)
        return self._adapter.last_slot(states), self._layout.targets[chosen], owners


def make_rows(
    adapter: AttachedAdapter,
    encoded: EncodedSet,
    cache: bool = True,
    on_disk: bool = True,
    offsets: Tensor | None = None,
) -> Rows:
    """Rows of encoded examples by the shortest route.

    ``cache``: keep states where possible; ``on_disk``: in files too, which examples of one round are not worth.
    ``offsets``: added to the label words' logits, ``n x C``.
    """
    block = first_block(adapter)
    if not cache or block == 0 or not len(encoded):
        return FullRows(adapter, encoded, offsets)
    if block is None:
        return CachedRows(adapter, encoded, on_disk, offsets)
    if not can_start_at(adapter, encoded, block):
        return FullRows(adapter, encoded, offsets)
    return PrefixRows(adapter, encoded, block, on_disk, offsets)
