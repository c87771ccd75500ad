"""Toy models in numpy: no torch, trained by hand-written gradients.

Each model type sees a text's hidden meaning ``s`` through its own random non-linear features ``x = tanh(M_m s)`` of its
own width and reads labels off with its own matrix ``W_m``. DeMA's last slot (and LoRA on the read-out, or a core in it)
are trained. What is shared between types is thus exactly what the method claims: meaning, in different bases.
"""

from __future__ import annotations

import numpy as np

from heterotune_flwr.channels.statistics.record import ClassSums
from heterotune_flwr.dema.bank import bank_shapes

MEANING, ANCHORS, COMPONENTS = 10, 300, 16


LABELS = [f"label-{i}" for i in range(6)]


WIDTHS = {"small": 24, "middle": 32, "large": 40}


def softmax(logits):
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)


class Backbone:
    """One toy model type."""

    def __init__(self, name: str) -> None:
        self.rng = np.random.default_rng(sorted(WIDTHS).index(name))
        width = WIDTHS[name]
        self.mixing = self.rng.normal(size=(width, MEANING)) * 0.4
        self.labels = self.rng.normal(size=(len(LABELS), width)) / np.sqrt(width)
        self.width = width

    def cut(self, method):
        """HeteroFL's slice: some of the features, and the parent's weights for them."""
        chosen = self.slice_of(method)
        part = Backbone.__new__(Backbone)
        part.mixing, part.labels = self.mixing[chosen], self.labels[:, chosen]
        part.width = len(chosen)
        return part

    def slice_of(self, method):
        count = round(method.sub_width * self.width)
        return [
            (method.sub_window + i) % self.width if count < self.width else i for i in range(count)
        ]

    def states(self, meaning):
        return np.tanh(meaning @ self.mixing.T)

    def factors(self, part="slots"):
        """Of the states; a view has the same."""
        public = np.random.default_rng(99).normal(size=(ANCHORS, MEANING)) * 1.5
        states = self.states(public)
        mean = states.mean(axis=0)
        _, _, right = np.linalg.svd(states - mean, full_matrices=False)
        basis = right[:COMPONENTS]
        parts = {"scores": (states - mean) @ basis.T, "basis": basis, "mean": mean}
        if part != "slots":
            return {f"{part}.{name}": value for name, value in parts.items()}
        return {**{f"slots.0.{n}": part for n, part in parts.items()}, "label_rows": self.labels}


def examples(seed, count, mixture):
    """Meanings and labels of texts; label centres are the same for everybody."""
    centres = np.random.default_rng(7).normal(size=(len(LABELS), MEANING)) * 1.2
    rng = np.random.default_rng(seed)
    labels = rng.choice(len(LABELS), size=count, p=mixture)
    return centres[labels] + rng.normal(size=(count, MEANING)), labels


def forward(tensors, maps, backbone, states):
    """Logits and what the gradients need."""
    base = states @ backbone.labels.T
    if "lora.head.residual" in tensors:
        base = base + states @ tensors["lora.head.residual"].T
    if "lora.head.R" in tensors:
        up, down = fixed_factors(backbone, tensors["lora.head.R"].shape[0])
        inner = states @ down.T
        return base + inner @ tensors["lora.head.R"].T @ up.T, inner
    if "sub.head" in tensors:
        return base + states @ tensors["sub.head"].T, None
    if "lora.head.A" in tensors:
        inner = states @ tensors["lora.head.A"].T
        return base + inner @ tensors["lora.head.B"].T, inner
    z = latents(maps, states)
    gate = softmax(z @ tensors["slots.0.gate.weight"].T + tensors["slots.0.gate.bias"])
    experts = sorted({n.rsplit(".", 2)[0] for n in tensors if ".experts." in n}, key=expert_order)
    parts, y = [], 0.0
    for index, name in enumerate(experts):
        if f"{name}.up.bias" in tensors:  # Co-LoRA: P z + Q
            u = z @ tensors[f"{name}.up.weight"].T + tensors[f"{name}.up.bias"]
            parts.append((name, None, None, u))
            y = y + gate[:, index : index + 1] * u
            continue
        h = z @ tensors[f"{name}.down.weight"].T + tensors[f"{name}.down.bias"]
        sigmoid = 1 / (1 + np.exp(-h))
        u = (h * sigmoid) @ tensors[f"{name}.up.weight"].T
        parts.append((name, h, sigmoid, u))
        y = y + gate[:, index : index + 1] * u
    effect = backbone.labels @ maps["slots.0.map.up.weight"]
    return base + y @ effect.T, (z, gate, parts, effect)


def latents(maps, states):
    """The last slot's, of the bare backbone."""
    return states @ maps["slots.0.map.down.weight"].T + maps["slots.0.map.down.bias"]


def both_views(maps, states):
    """The same, and those of whole texts where they are aligned."""
    own = latents(maps, states)
    if "text.map.down.weight" not in maps:
        return own
    return np.hstack([own, states @ maps["text.map.down.weight"].T + maps["text.map.down.bias"]])


def class_sums(z, labels, least):
    """What a client tells of classes with at least so many examples."""
    counts = np.bincount(labels, minlength=len(LABELS))
    told = counts * (counts >= least)
    sums = [z[labels == c].sum(axis=0) if n else np.zeros(z.shape[1]) for c, n in enumerate(told)]
    return ClassSums(told.astype(np.float32), np.array(sums, np.float32))


def fixed_factors(backbone, rank):
    """Fed-SB's frozen B and A: leading singular vectors of the read-out."""
    left, _, right = np.linalg.svd(backbone.labels, full_matrices=False)
    return left[:, :rank], right[:rank]


def expert_order(name):
    return int(name.rpartition(".")[2])


def gradients(tensors, maps, backbone, states, labels):
    """Loss and gradients of every tensor; ``labels`` are numbers, or rows of probabilities."""
    logits, kept = forward(tensors, maps, backbone, states)
    targets = np.eye(len(LABELS))[labels] if labels.ndim == 1 else labels
    probabilities = softmax(logits)
    loss = -(targets * np.log(probabilities + 1e-12)).sum(axis=1).mean()
    error = (probabilities - targets) / len(labels)
    if "lora.head.R" in tensors:
        up, _ = fixed_factors(backbone, tensors["lora.head.R"].shape[0])
        return loss, {"lora.head.R": up.T @ error.T @ kept}
    if "sub.head" in tensors:
        return loss, {"sub.head": error.T @ states}
    if "lora.head.A" in tensors:
        return loss, {
            "lora.head.B": error.T @ kept,
            "lora.head.A": (error @ tensors["lora.head.B"]).T @ states,
        }
    z, gate, parts, effect = kept
    dy = error @ effect
    grads, dgate = {}, np.zeros_like(gate)
    for index, (name, h, sigmoid, u) in enumerate(parts):
        weighted = gate[:, index : index + 1] * dy
        if h is None:
            grads[f"{name}.up.weight"] = weighted.T @ z
            grads[f"{name}.up.bias"] = weighted.sum(axis=0)
            dgate[:, index] = (dy * u).sum(axis=1)
            continue
        grads[f"{name}.up.weight"] = weighted.T @ (h * sigmoid)
        slope = sigmoid * (1 + h * (1 - sigmoid))
        dh = (weighted @ tensors[f"{name}.up.weight"]) * slope
        grads[f"{name}.down.weight"], grads[f"{name}.down.bias"] = dh.T @ z, dh.sum(axis=0)
        dgate[:, index] = (dy * u).sum(axis=1)
    dlogit = gate * (dgate - (gate * dgate).sum(axis=1, keepdims=True))
    grads["slots.0.gate.weight"], grads["slots.0.gate.bias"] = dlogit.T @ z, dlogit.sum(axis=0)
    return loss, grads


def adapter_shapes(method, backbone):
    """Tensors that a client trains, by name."""
    if method.kind == "submodel":
        return {"sub.head": (len(LABELS), len(backbone.slice_of(method)))}
    if method.kind != "lora":
        return bank_shapes(method, method.output)
    rank = method.lora_rank
    if method.lora_core:
        return {"lora.head.R": (rank, rank)}
    shapes = {"lora.head.A": (rank, backbone.width), "lora.head.B": (len(LABELS), rank)}
    if method.lora_residual:
        shapes["lora.head.residual"] = (len(LABELS), backbone.width)
    return shapes


def train_toy(tensors, train, batches, frozen, corrections):
    """Train in place as a client does (AdamW, or SGD with clipped gradients); returns the last loss.

    ``batches()`` gives a step's loss and gradients; ``corrections`` are added to them.
    """
    first = {n: np.zeros_like(v) for n, v in tensors.items()}
    second = {n: np.zeros_like(v) for n, v in tensors.items()}
    for step in range(1, train.local_steps + 1):
        loss, grads = batches()
        grads = {n: g + corrections.get(n, 0.0) for n, g in grads.items() if n not in frozen}
        norm = np.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        for name in sorted(grads):
            grad = grads[name] / max(1.0, norm)
            if train.optimizer == "sgd":
                tensors[name] -= train.learning_rate * grad
                continue
            first[name] = 0.9 * first[name] + 0.1 * grad
            second[name] = 0.999 * second[name] + 0.001 * grad**2
            scaled = first[name] / (1 - 0.9**step)
            scaled /= np.sqrt(second[name] / (1 - 0.999**step)) + 1e-8
            tensors[name] -= train.learning_rate * scaled
    return loss
