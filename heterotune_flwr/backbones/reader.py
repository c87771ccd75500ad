"""Reads a decoder on texts as token ids: padded batches, states at positions, what enters blocks, means of texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from heterotune_flwr.backbones.batches import batches_by_length
from heterotune_flwr.backbones.loading import Backbone
from heterotune_flwr.backbones.structure import find_structure

#: Tokens of one batch that nothing is trained on, padding included.
BATCH_TOKENS = 2048
Lines = Sequence[Sequence[int]]


def batches(lines: Lines) -> Iterator[list[int]]:
    """Indices of texts in batches of similar length: a function of the list alone."""
    return batches_by_length([len(line) for line in lines], BATCH_TOKENS)


class _Reached(Exception):  # noqa: N818 (no error: it ends a pass early)
    """A forward pass has reached the block it was run for."""


@dataclass(frozen=True, eq=False)
class Reader:
    """A decoder's body, with its blocks; a line is the token ids of one text."""

    body: nn.Module
    blocks: nn.ModuleList
    pad_id: int
    device: torch.device

    @classmethod
    def of(cls, backbone: Backbone) -> Reader:
        """Reader of a backbone's model: adapters that are put into it later are read too."""
        structure = find_structure(backbone.model)
        body = backbone.model.get_submodule(structure.body)
        blocks = backbone.model.get_submodule(structure.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return cls(body, blocks, backbone.pad_id, backbone.device)

    def padded(self, lines: Lines) -> dict[str, Tensor]:
        """Token ids and attention mask ``B x T``, padded on the right."""
        longest = max(map(len, lines))
        ids = torch.full((len(lines), longest), self.pad_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, line in enumerate(lines):
            ids[row, : len(line)] = torch.tensor(line)
            mask[row, : len(line)] = 1
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}

    def final_states(self, lines: Lines) -> Tensor:
        """Final normalised states ``B x T x d`` of one batch."""
        states: Tensor = self.body(**self.padded(lines), use_cache=False).last_hidden_state
        return states

    def states_at(self, lines: Lines, positions: Lines) -> Tensor:
        """Final normalised states ``R x d`` at some positions of every line of one batch."""
        rows = [row for row, places in enumerate(positions) for _ in places]
        states = self.final_states(lines)
        chosen: Tensor = states[rows, [place for places in positions for place in places]]
        return chosen

    @torch.no_grad()
    def states_behind(self, prompts: Lines, suffixes: Lines, offsets: Lines) -> Tensor:
        """Final normalised states of prompts continued in several ways (``prompts x places x d``).

        Every prompt is read once: the ways go on from its keys and values. A family that keeps other things of what it
        has read (convolutions, recurrent states) reads whole lines. Places are counted from a prompt's last token (0),
        suffix by suffix. The numbers are those of whole lines up to rounding.
        """
        found: list[Tensor] = [torch.empty(0)] * len(prompts)
        longest = max(map(len, suffixes))
        for length in sorted(set(map(len, prompts))):  # of one length: nothing is padded
            alike = [number for number, prompt in enumerate(prompts) if len(prompt) == length]
            size = max(1, BATCH_TOKENS // (len(suffixes) * (length + longest)))
            for start in range(0, len(alike), size):
                batch = alike[start : start + size]
                rows = self._continued([prompts[number] for number in batch], suffixes, offsets)
                for number, states in zip(batch, rows, strict=True):
                    found[number] = states
        return torch.stack(found)

    def _continued(self, prompts: Lines, suffixes: Lines, offsets: Lines) -> Tensor:
        """The same of prompts of one length, all at once."""
        ids = torch.tensor(prompts, device=self.device)
        first = self.body(input_ids=ids, use_cache=True)
        if not _is_of_attention(first.past_key_values):
            return self._in_whole_lines(prompts, suffixes, offsets)
        first.past_key_values.batch_repeat_interleave(len(suffixes))
        # Padding lies behind what is read: causal attention does not see it.
        further = self.padded(suffixes)["input_ids"].repeat(len(prompts), 1)
        states = self.body(
            input_ids=further, past_key_values=first.past_key_values, use_cache=True
        ).last_hidden_state
        states = states.view(len(prompts), len(suffixes), further.shape[1], -1)
        last = first.last_hidden_state[:, -1]
        places = [
            states[:, number, place - 1] if place else last
            for number, of_line in enumerate(offsets)
            for place in of_line
        ]
        return torch.stack(places, dim=1)

    def _in_whole_lines(self, prompts: Lines, suffixes: Lines, offsets: Lines) -> Tensor:
        """The same without keys and values."""
        lines = [[*prompt, *suffix] for prompt in prompts for suffix in suffixes]
        positions = [
            [len(prompt) - 1 + place for place in of_line]
            for prompt in prompts
            for of_line in offsets
        ]
        states = self.states_at(lines, positions)
        return states.view(len(prompts), -1, states.shape[-1])

    def entering(self, lines: Lines, numbers: Sequence[int]) -> list[list[Tensor]]:
        """What enters some blocks, in rising order: per line one ``T_i x d`` for each, without padding.

        Nothing above them is computed.
        """
        seen: list[Tensor] = []

        def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])
            if len(seen) == len(numbers):
                raise _Reached

        hooks = [
            self.blocks[number].register_forward_pre_hook(read, with_kwargs=True)
            for number in numbers
        ]
        try:
            self.body(**self.padded(lines), use_cache=False)
        except _Reached:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return [[states[row, : len(line)] for states in seen] for row, line in enumerate(lines)]

    @torch.no_grad()
    def text_means(self, lines: Lines, numbers: Sequence[int]) -> Tensor:
        """Means over a text's tokens of what enters some blocks, in rising order (``n x blocks d``, float32).

        The first token is left out where there is another: models park attention there (attention sinks, arXiv
        2309.17453), whatever the text is.
        """
        rows: list[Tensor] = [torch.empty(0)] * len(lines)
        for batch in batches(lines):
            found = self.entering([lines[index] for index in batch], numbers)
            for index, states in zip(batch, found, strict=True):
                rows[index] = torch.cat(
                    [part[min(1, len(part) - 1) :].float().mean(dim=0) for part in states]
                )
        return torch.stack(rows)


def _is_of_attention(cache: Any) -> bool:
    """Whether a cache holds keys and values alone: what else a family keeps cannot be repeated for several lines."""
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    return isinstance(cache, DynamicCache) and all(type(layer) in known for layer in cache.layers)
