"""What a client does with the shared discriminant: it tells its classes' sums, and adds the logits to its own model's.

Both read the latents of the *bare* backbone, which every type has in the same space and which no training moves:
adapted states of different models drift apart.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.federation.discriminant import ClassSums, Discriminant
from heterotune_flwr.tuning.adapters import AttachedAdapter
from heterotune_flwr.tuning.states import bare_states, bare_text_states
from heterotune_flwr.tuning.task import EncodedSet, Task


@torch.no_grad()
def shared_latents(adapter: AttachedAdapter, encoded: EncodedSet) -> Tensor:
    """Latents of examples in the bare backbone: ``n x r``, or ``n x 2 r`` with the method's view of whole texts."""
    device = adapter.backbone.device
    latents = adapter.last_latents(bare_states(adapter, encoded).to(device))
    if not adapter.method.text_view:
        return latents
    of_texts = adapter.text_latents(bare_text_states(adapter, encoded).to(device))
    return torch.cat([latents, of_texts], dim=1)


@torch.no_grad()
def class_sums(
    adapter: AttachedAdapter, task: Task, encoded: EncodedSet, least: int
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

    """
    if not least or not len(encoded) or task.kind != "labels" or adapter.kind != "dema":
        return None
    classes = len(task.labels or ())
    latents = shared_latents(adapter, encoded).double().cpu()
    labels = torch.tensor([targets[0] for targets in encoded.targets], dtype=torch.long)
    counts = torch.bincount(labels, minlength=classes)
    sums = torch.zeros(classes, latents.shape[1], dtype=torch.double).index_add_(0, labels, latents)
    told = counts >= least
    return ClassSums(
        np.asarray((counts * told).numpy(), np.float32),
        np.asarray((sums * told[:, None]).numpy(), np.float32),
    )


@torch.no_grad()
def discriminant_logits(
    discriminant: Discriminant | None, adapter: AttachedAdapter, encoded: EncodedSet
) -> Tensor | None:
    """Logits of the labels for every example (``n x C``, float32, on the backbone's device); None for no discriminant.

    Raises
    ------
    ExchangeError
        The discriminant is of another latent space.

    """
    if discriminant is None or not len(encoded):
        return None
    device = adapter.backbone.device
    latents = shared_latents(adapter, encoded)
    weight = torch.from_numpy(discriminant.weight).to(device)
    if weight.shape[1] != latents.shape[1]:
        raise ExchangeError(
            f"the discriminant is of {weight.shape[1]} latents, the adapter has {latents.shape[1]}"
        )
    return functional.linear(latents, weight, torch.from_numpy(discriminant.bias).to(device))
