"""Puts the heads of adapters to work: in every pass of a causal LM that reads a prompt from its beginning.

A head acts on the logits of the labels' first tokens at the positions where an answer begins. These are known by the
ids that every prompt ends with, so that neither padding nor what a model writes after the label matters. It is not at
work in passes that go on from a cache, nor where embeddings are given in the place of token ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from heterotune_flwr.backbones.reader import Lines, Reader, batches
from heterotune_flwr.backbones.structure import find_structure
from heterotune_flwr.backbones.views import VIEWS
from heterotune_flwr.dema.head import LabelHead
from heterotune_flwr.dema.layer import DeMALayer


class LabelLogits:
    """The heads on one causal LM, as a forward hook of it (``with_kwargs``)."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._read: Reader | None = None

    @torch.no_grad()
    def offsets(self, adapter_name: str, lines: Lines) -> Tensor:
        """What an adapter's head adds to the labels' logits of prompts (``n x C``, float32); a line is token ids.

        Batches depend on the list alone, as where a federation measures.
        """
        layer = next(layer for layer in self._layers() if adapter_name in layer.dema_head)
        head = cast(LabelHead, layer.dema_head[adapter_name])
        if not head.reads:
            return head.offsets(None, len(lines))
        reader = self._reader()
        with self._bare():
            states: list[Tensor] = [torch.empty(0)] * len(lines)
            for batch in batches(lines):
                chosen = [lines[index] for index in batch]
                found = reader.states_at(chosen, [[len(line) - 1] for line in chosen])
                for index, state in zip(batch, found, strict=True):
                    states[index] = state
            latents = [layer.latents(torch.stack(states), adapter_name)]
            views = layer.configs[adapter_name].head_views
            latents += [head.view_latents(v, VIEWS[v].states(reader, lines)) for v in views]
        return head.offsets(torch.cat(latents, dim=1), len(lines))

    @torch.no_grad()
    def _added(
        self, ids: Tensor, real: Tensor, length: int
    ) -> Iterator[tuple[list[int], list[int], list[int], Tensor]]:
        """Rows, positions, tokens, and what their logits get (rows x tokens), of every active adapter with a head."""
        for layer in self._layers():
            for name in [] if layer.disable_adapters else layer.active_names():
                if name not in layer.dema_head:
                    continue
                config = layer.configs[name]
                rows, places = answer_positions(ids, real, config.head_prompt_end)
                if rows:
                    lines = [
                        ids[row, : place + 1][real[row, : place + 1]].tolist()
                        for row, place in zip(rows, places, strict=True)
                    ]
                    added = self.offsets(name, lines)
                    yield rows, places, *first_tokens(added, config.head_labels or [])

    def __call__(
        self, module: Any, args: Sequence[Any], given: Mapping[str, Any], output: Any
    ) -> Any:
        """Change the logits of a pass, and the loss where it has one."""
        ids = given.get("input_ids", args[0] if args else None)
        mask = given.get("attention_mask", args[1] if len(args) > 1 else None)
        past = given.get("past_key_values")
        if ids is None or (past is not None and past.get_seq_length() > ids.shape[1]):
            return output
        real = torch.ones_like(ids, dtype=torch.bool)
        if mask is not None and mask.ndim == 2:
            real = mask[:, -ids.shape[1] :].bool()
        named = hasattr(output, "logits")
        labels = given.get("labels")
        logits = output.logits if named else output[labels is not None]
        columns = logit_columns(ids.shape[1], logits.shape[1], given.get("logits_to_keep", 0))
        changed = logits
        for rows, places, tokens, added in self._added(ids, real, ids.shape[1]):
            changed = with_offsets(changed, columns, rows, places, tokens, added)
        if changed is logits:
            return output
        loss = None
        if labels is not None:
            size = self._model.config.get_text_config().vocab_size
            loss = module.loss_function(logits=changed, labels=labels, vocab_size=size)
        if not named:
            return (*(() if loss is None else (loss,)), changed, *output[1 + (loss is not None) :])
        output.logits, output.loss = changed, loss
        return output

    def _layers(self) -> list[DeMALayer]:
        return [module for module in self._model.modules() if isinstance(module, DeMALayer)]

    def _reader(self) -> Reader:
        if self._read is None:
            found = find_structure(self._model)
            body = self._model.get_submodule(found.body)
            blocks = cast(nn.ModuleList, self._model.get_submodule(found.blocks))
            device = self._model.get_input_embeddings().weight.device
            self._read = Reader(body, blocks, 0, device)  # padding is masked: any id will do
        return self._read

    @contextmanager
    def _bare(self) -> Iterator[None]:
        """The model without any adapter."""
        layers = self._layers()
        before = [layer._disable_adapters for layer in layers]
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer, was in zip(layers, before, strict=True):
                layer._disable_adapters = was


def answer_positions(ids: Tensor, real: Tensor, end: Sequence[int]) -> tuple[list[int], list[int]]:
    """Rows and positions of token ids ``B x T`` where an answer begins: right after the ids ``end``.

    ``real`` (bool ``B x T``) is false at padding. Without ``end`` it is every row's last token that is no padding.
    """
    if not end:
        last = real.long().cumsum(dim=1).argmax(dim=1)
        return list(range(len(ids))), last.tolist()
    if ids.shape[1] < len(end):
        return [], []
    wanted = torch.tensor(list(end), device=ids.device)
    same = (ids.unfold(1, len(end), 1) == wanted) & real.unfold(1, len(end), 1)
    rows, starts = same.all(-1).nonzero(as_tuple=True)
    return rows.tolist(), (starts + len(end) - 1).tolist()


def first_tokens(offsets: Tensor, labels: Sequence[Sequence[int]]) -> tuple[list[int], Tensor]:
    """First tokens of the labels, each once, and what their logits get (``N x tokens``) of the labels' ``N x C``.

    Labels that begin alike share a token: it gets the logarithm of the mean of their factors.
    """
    tokens = list(dict.fromkeys(label[0] for label in labels))
    begins = torch.tensor([[label[0] == token for label in labels] for token in tokens])
    begins = begins.to(offsets.device)
    shared = offsets[:, None, :].masked_fill(~begins, float("-inf")).logsumexp(-1)
    return tokens, shared - begins.sum(-1).log()


def logit_columns(length: int, columns: int, kept: int | Tensor) -> dict[int, int]:
    """Position -> column of the logits of a pass over ``length`` tokens; ``kept``: transformers' ``logits_to_keep``."""
    places = torch.arange(length)
    places = places[kept.cpu()] if isinstance(kept, Tensor) else places[length - columns :]
    return {int(place): column for column, place in enumerate(places)}


def with_offsets(
    logits: Tensor,
    columns: Mapping[int, int],
    rows: Sequence[int],
    places: Sequence[int],
    tokens: Sequence[int],
    added: Tensor,
) -> Tensor:
    """Logits with ``added`` (``N x tokens``) at N positions of rows; positions without a column are left out."""
    chosen = [index for index, place in enumerate(places) if place in columns]
    if not chosen:
        return logits
    device = logits.device
    row = torch.tensor([rows[index] for index in chosen], device=device)[:, None]
    column = torch.tensor([columns[places[index]] for index in chosen], device=device)[:, None]
    token = torch.tensor(list(tokens), device=device)[None, :]
    changed = logits.clone()
    raised = logits[row, column, token].float() + added[chosen].to(device)
    changed[row, column, token] = raised.to(logits.dtype)
    return changed
