"""Puts the heads of adapters to work: in every pass of a causal LM that reads a prompt from its beginning.

A head acts on the logits of the labels' first tokens at the positions where an answer begins. These are known by the
ids that every prompt ends with, so that neither padding nor what a model writes after the label matters. It is not at
work in passes that go on from a cache, nor where embeddings are given in the place of token ids.

Where it is, the labels' logits are products in float32, as where a federation measures, and all logits are float32:
bfloat16 would round them by more than labels differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from heterotune_flwr.backbones.head import HeadScaling, measured_scaling
from heterotune_flwr.backbones.reader import Lines, Reader, batches
from heterotune_flwr.backbones.structure import find_structure
from heterotune_flwr.backbones.views import VIEWS
from heterotune_flwr.dema.layer import DeMALayer


class LabelLogits:
    """The heads on one causal LM: hooks of it and of its unembedding, from now on until :meth:`remove`."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._parts: tuple[nn.Module, nn.ModuleList] | None = None
        self._scale: HeadScaling | None = None
        self._states: Tensor | None = None
        self._hooks = [
            model.register_forward_hook(self._change, with_kwargs=True),
            model.get_output_embeddings().register_forward_pre_hook(self._remember),
        ]

    def remove(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def offsets(self, adapter_name: str, lines: Lines) -> Tensor:
        """What an adapter's head adds to the labels' logits of prompts (``n x C``, float32); a line is token ids.

        Batches depend on the list alone, as where a federation measures.
        """
        layer, head = next(
            (layer, head)
            for layer in self._layers()
            if (head := layer.head(adapter_name)) is not None
        )
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

    def _added(
        self, ids: Tensor, real: Tensor, columns: Mapping[int, int]
    ) -> Iterator[tuple[list[int], list[int], list[int], Tensor]]:
        """Rows, columns, tokens, and what their logits get (rows x tokens), of every active adapter with a head."""
        for layer in self._layers():
            for name in [] if layer.disable_adapters else layer.active_names():
                if layer.head(name) is None:
                    continue
                config = layer.configs[name]
                found = answer_positions(ids, real, config.head_prompt_end)
                begins = [(row, place) for row, place in found if place in columns]
                if begins:
                    lines = [ids[r, : p + 1][real[r, : p + 1]].tolist() for r, p in begins]
                    tokens, added = first_tokens(
                        self.offsets(name, lines), config.head_labels or []
                    )
                    rows, places = zip(*begins, strict=True)
                    yield list(rows), [columns[place] for place in places], tokens, added

    def _exact(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Logits of some tokens (float32 ``N x tokens``) for what enters the unembedding (``N x d``)."""
        head = self._model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        if self._scale is None:
            with self._bare():
                self._scale = measured_scaling(self._model)
        return self._scale(
            functional.linear(
                states.float(),
                head.weight[tokens].float(),
                None if bias is None else bias[tokens].float(),
            )
        )

    def _remember(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._states = args[0]

    def _change(
        self, module: Any, args: Sequence[Any], given: Mapping[str, Any], output: Any
    ) -> Any:
        """Change the logits of a pass, and the loss where it has one."""
        states, self._states = self._states, None
        ids = given.get("input_ids", args[0] if args else None)
        mask = given.get("attention_mask", args[1] if len(args) > 1 else None)
        past = given.get("past_key_values")
        if ids is None or states is None:
            return output
        if past is not None and past.get_seq_length() > ids.shape[1]:  # it holds this pass by now
            return output
        real = torch.ones_like(ids, dtype=torch.bool)
        if mask is not None and mask.ndim == 2:
            real = mask[:, -ids.shape[1] :].bool()
        named = hasattr(output, "logits")
        labels = given.get("labels")
        logits = output.logits if named else output[labels is not None]
        columns = logit_columns(ids.shape[1], logits.shape[1], given.get("logits_to_keep", 0))
        changed = None
        for rows, places, tokens, added in self._added(ids, real, columns):
            row, column, token = (
                torch.tensor(part, device=logits.device) for part in (rows, places, tokens)
            )
            if changed is None:
                changed = logits.float()
                changed = changed.clone() if changed is logits else changed
                changed[row[:, None], column[:, None], token] = self._exact(
                    states[row, column], token
                )
            changed[row[:, None], column[:, None], token] += added.to(logits.device)
        if changed is None:
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
        if self._parts is None:
            found = find_structure(self._model)
            blocks = cast(nn.ModuleList, self._model.get_submodule(found.blocks))
            self._parts = self._model.get_submodule(found.body), blocks
        device = self._model.get_input_embeddings().weight.device
        return Reader(*self._parts, 0, device)  # padding is masked: any id will do

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


def answer_positions(ids: Tensor, real: Tensor, end: Sequence[int]) -> list[tuple[int, int]]:
    """(row, position) of every place in token ids ``B x T`` where an answer begins: right after the ids ``end``.

    ``real`` (bool ``B x T``) is false at padding. Without ``end`` it is every row's last token that is no padding.
    """
    if not end:
        last = real.long().cumsum(dim=1).argmax(dim=1)
        return list(enumerate(last.tolist()))
    if ids.shape[1] < len(end):
        return []
    wanted = torch.tensor(list(end), device=ids.device)
    same = (ids.unfold(1, len(end), 1) == wanted) & real.unfold(1, len(end), 1)
    return [(row, start + len(end) - 1) for row, start in same.all(-1).nonzero().tolist()]


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
