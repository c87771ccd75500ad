"""What a client does with class statistics: it tells its classes' sums, and adds a classifier's logits to its model's.

Both read the latents of the *bare* backbone, which every type has in the same space and which no training moves:
adapted states of different models drift apart.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from heterotune_flwr.alignment.views import classifier_places, views_of
from heterotune_flwr.channels.channel import Purpose
from heterotune_flwr.channels.client_half import ClientChannel, ClientWork
from heterotune_flwr.channels.limits import bounded
from heterotune_flwr.channels.statistics.record import ClassSums, LinearClassifier, Request
from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.protocol.payloads import Payload
from heterotune_flwr.tuning.adapters import AttachedAdapter
from heterotune_flwr.tuning.frozen_states import bare_states, bare_view
from heterotune_flwr.tuning.kept_model import Head
from heterotune_flwr.tuning.task import EncodedSet, Task

#: States that go through the maps at a time: the tables may be larger than the device's memory.
_ROWS_AT_A_TIME = 4096
#: Largest weight or bias of a classifier.
LARGEST_LOGITS = 1e3


@torch.no_grad()
def shared_latents(adapter: AttachedAdapter, encoded: EncodedSet, cache: bool = True) -> Tensor:
    """Latents of labelled examples in the bare backbone, at the prompt's end: ``n x r``, then the method's views'.

    On the backbone's device; ``cache``: whether the states behind them are kept.
    """
    device = adapter.backbone.device

    def mapped(states: Tensor, maps: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.cat([maps(part.to(device)) for part in torch.split(states, _ROWS_AT_A_TIME)])

    at_prompts = bare_states(adapter, encoded, cache)[:: encoded.states_each]
    latents = [mapped(at_prompts, adapter.last_latents)]
    for view in views_of(adapter.method):
        maps = partial(adapter.view_latents, view)
        latents.append(mapped(bare_view(adapter, view, encoded, cache), maps))
    return torch.cat(latents, dim=1)


@torch.no_grad()
def class_sums(
    adapter: AttachedAdapter, task: Task, encoded: EncodedSet, least: int, cache: bool = True
) -> ClassSums | None:
    """Examples of every class and the sums of their latents; zeros for a class of fewer than ``least`` examples.

    None where nothing is asked (``least`` 0), there are no examples, no closed label set, or no shared latents.

    Parameters
    ----------
    adapter
        DeMA, with the maps of its type.
    task, encoded
        The closed label set, and labelled examples of it: one loss position and one target each.
    least
        What a single example says of itself stays at home from 2 on.
    cache
        Whether the states are kept.

    """
    if not least or not len(encoded) or task.kind != "labels" or adapter.kind != "dema":
        return None
    classes = len(task.labels or ())
    latents = shared_latents(adapter, encoded, cache).double().cpu()
    labels = torch.tensor([targets[0] for targets in encoded.targets], dtype=torch.long)
    counts = torch.bincount(labels, minlength=classes)
    sums = torch.zeros(classes, latents.shape[1], dtype=torch.double).index_add_(0, labels, latents)
    told = counts >= least
    return ClassSums(
        np.asarray((counts * told).numpy(), np.float32),
        np.asarray((sums * told[:, None]).numpy(), np.float32),
    )


@torch.no_grad()
def classifier_logits(
    classifier: LinearClassifier,
    adapter: AttachedAdapter,
    task: Task,
    encoded: EncodedSet,
    cache: bool = True,
) -> Tensor:
    """Logits of the labels for every example (``n x C``, float32, on the backbone's device).

    Raises
    ------
    ExchangeError
        It is of other labels or another latent space, or not finite; or there is no closed label set or no latents.

    """
    if adapter.kind != "dema" or task.kind != "labels":
        raise ExchangeError(
            "class statistics need a closed label set and a method with shared latents"
        )
    if not (np.isfinite(classifier.weight).all() and np.isfinite(classifier.bias).all()):
        raise ExchangeError("the classifier holds numbers that are not finite")
    places = classifier_places(adapter.method)
    wanted = (len(task.labels or ()), adapter.method.latent * len(places))
    if classifier.weight.shape != wanted:
        labels, latents = classifier.weight.shape
        raise ExchangeError(
            f"the classifier is of {labels} labels and {latents} latents, here are {wanted[0]} and {wanted[1]}"
        )
    device = adapter.backbone.device
    weight, bias = (torch.from_numpy(v).to(device) for v in (classifier.weight, classifier.bias))
    return functional.linear(shared_latents(adapter, encoded, cache), weight, bias)


class Channel(ClientChannel):
    """The client's half."""

    def __init__(self, asked: Payload, work: ClientWork) -> None:
        super().__init__(asked, work)
        self.request = Request.from_payload(asked)
        #: By what they are of: what is fitted is predicted too.
        self._found: dict[str, Tensor] = {}

    @classmethod
    def check(cls, asked: Payload) -> None:
        """Bound the classifier."""
        bounded(asked.tensors, "the classifier's tensors", LARGEST_LOGITS)

    def logits(self, of: EncodedSet, purpose: Purpose) -> Tensor | None:
        """The classifier's: a share of them while the client fits others' predictions, all of them otherwise."""
        classifier, work = self.request.classifier, self.work
        if classifier is None or purpose == "train" or not len(of):
            return None
        if of.digest not in self._found:
            cache = work.config.train.cache_states
            self._found[of.digest] = classifier_logits(
                classifier, work.adapter, work.task, of, cache
            )
        found = self._found[of.digest]
        return self.request.distill_share * found if purpose == "fit" else found

    def head(self) -> Head | None:
        """The classifier as it came."""
        found = self.request.classifier
        return None if found is None else Head(found.weight, found.bias)

    def reply(self) -> Payload | None:
        """Sums of the own examples' classes, as far as the node's owner allows."""
        work, least = self.work, self.work.node.allowed_min_count(self.request.min_count)
        cache = work.config.train.cache_states
        told = class_sums(work.adapter, work.task, work.own, least, cache)
        return None if told is None else told.to_payload()
