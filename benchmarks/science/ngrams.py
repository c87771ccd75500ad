"""A rival without any model: a linear classifier of character n-grams, pooled over all clients.

Each client tells the counts of its classes and the sums of their texts' n-grams: tf-idf of n-grams of three to five
characters, on 256 principal axes of the public anchors, the same for everybody, so that nothing has to be aligned.
Pooled, they are the same closed form as the shared discriminant of models. Accuracy on the global test in percent,
mean over seeds, three types with 1, 2, 4 and 16 clients each, as the embedded family's suites have them: of all
clients, of one type's clients alone, and of each client by itself.

Run: ``pip install -e '.[benchmarks]'; python -m benchmarks.science.ngrams`` (a minute).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.runner import arguments, say, write_results
from benchmarks.science.laboratory.clients import draw_clients
from benchmarks.science.laboratory.rows import ALIGNMENT
from benchmarks.science.laboratory.states import Task, load_task
from heterotune_flwr.alignment.public_texts import load_anchors
from heterotune_flwr.channels.statistics.server import (
    Classes,
    StatisticsOptions,
    linear_discriminant,
)

CLIENTS, TYPES = (1, 2, 4, 16), 3
#: Neither the headline's nor those of its sweeps.
SEEDS = tuple(range(30, 36))
#: As many numbers a class as both views of a model have.
AXES = 256
Matrix = NDArray[np.float64]


def plain(text: str) -> str:
    """Letters and digits in lower case, with the ends of words."""
    return " " + " ".join(re.findall(r"[^\W_]+", text.lower())) + " "


class NgramView:
    """The public projection: in standard deviations over the anchors."""

    def __init__(self, anchors: Sequence[str], axes: int = AXES) -> None:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        self._pipeline = make_pipeline(
            TfidfVectorizer(
                analyzer="char", ngram_range=(3, 5), preprocessor=plain, sublinear_tf=True, min_df=2
            ),
            TruncatedSVD(axes, algorithm="arpack", random_state=0),
            StandardScaler(with_mean=False),
        ).fit(anchors)

    def of_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Latents of texts (``n x axes``)."""
        return np.asarray(self._pipeline.transform(texts), np.float32)


def told(z: NDArray[np.float32], labels: NDArray[np.int64], classes: int, least: int) -> Classes:
    """What a client tells: counts and sums of the classes of which it has enough examples."""
    counts = np.bincount(labels, minlength=classes)
    kept = counts >= least
    sums = np.zeros((classes, z.shape[1]))
    np.add.at(sums, labels, z)
    return Classes((counts * kept).astype(np.float64), sums * kept[:, None])


def measure(task: Task, view: NgramView, clients: int, seeds: Sequence[int]) -> dict[str, float]:
    """One row: of all, of one type's, of each client's classes."""
    options = StatisticsOptions()
    pool, test = view.of_texts(task.pool), view.of_texts(task.test)
    index = {text: i for i, text in enumerate(task.pool)}
    metric = np.ones(AXES)

    def right(parts: Sequence[Classes]) -> float:
        together = sum(parts[1:], start=parts[0])
        found = linear_discriminant(together.counts, together.sums, metric, options.prior)
        guessed = (test @ found.weight.T + found.bias).argmax(axis=1)
        return 100 * float((guessed == task.test_y).mean())

    rows: dict[str, list[float]] = {"pooled": [], "own_type": [], "alone": []}
    for seed in seeds:
        shares = draw_clients(task.data, clients * TYPES, [seed], index)
        parts = [
            told(pool[share], task.pool_y[share], len(task.labels), options.min_count)
            for share in shares
        ]
        rows["pooled"].append(right(parts))
        rows["own_type"] += [right(parts[kind::TYPES]) for kind in range(TYPES)]
        rows["alone"] += [right([part]) for part in parts]
    return {name: round(float(np.mean(values)), 1) for name, values in rows.items()}


def main() -> None:
    args = arguments(__doc__, SEEDS).parse_args()
    torch.set_num_threads(1)
    task, view = load_task(), NgramView(load_anchors(ALIGNMENT))
    values: dict[str, Any] = {"seeds": args.seeds, "axes": AXES}
    for clients in CLIENTS:
        values[f"{clients} per type"] = measure(task, view, clients, args.seeds)
        say(clients, "per type:", values[f"{clients} per type"])
    write_results("ngrams", values, anew=True)


if __name__ == "__main__":
    main()
