"""The model that a type's clients share, without what is one client's own: from all their kept records."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.dema.bank import initial_tensors, part_of
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.tuning.kept_model import FEDERATED, Choosing, Head, KeptModel

#: What may be a client's own, and the setting that says whether it is.
_OWN = {"gate": "gate_scope", "core": "core_scope"}


def shared_model(records: Sequence[KeptModel]) -> KeptModel:
    """What the clients of one type share: no gates, cores or rounds of one's own, no label prior.

    Metrics are means over the clients, and so is what channels add: each took home as much of it as helps it. Those of
    the federated model are from before a client's own rounds.

    Raises
    ------
    ConfigError
        The clients share no model: what they hold differs in more than that.

    """
    first = records[0]
    differing = {
        name
        for name, value in first.as_shared.items()
        if any(not np.array_equal(value, other.as_shared[name]) for other in records[1:])
    }
    if any(part_of(name) not in _OWN for name in differing):
        raise ConfigError(
            f"clients of {first.type_key} share no model in strategy {first.strategy!r}; export one client's with "
            f"--client {first.client_id}"
        )
    # One client's own, also where a type has one client: as it was before anybody trained.
    differing |= {
        name
        for name in first.as_shared
        if (part := part_of(name)) in _OWN and getattr(first.method, _OWN[part]) == "client"
    }
    own = initial_tensors({name: first.as_shared[name].shape for name in differing}, first.seed)
    return replace(
        first,
        client_id="",
        federated={**first.as_shared, **own},
        shared=None,
        own_rounds=0,
        shared_tests={},
        head=_mean_head([record.head for record in records]),
        alone=None,
        took=FEDERATED,
        choosing=Choosing(0, {}),
        prior=None,
        examples={
            name: sum(record.examples.get(name, 0) for record in records) for name in first.examples
        },
        tests={
            model: _means([_tests(record, model) for record in records if model in record.tests])
            for model in first.tests
            if model != "alone"
        },
    )


def _tests(record: KeptModel, model: str) -> dict[str, float]:
    before = record.shared_tests if model == FEDERATED else None
    return before or record.tests[model]


def _means(tests: Sequence[dict[str, float]]) -> dict[str, float]:
    names = [name for name in tests[0] if all(name in test for test in tests)]
    return {name: statistics.fmean(test[name] for test in tests) for name in names}


def _mean_head(heads: Sequence[Head | None]) -> Head | None:
    """Mean of what acts with each client, for some nothing; None where nothing acts with anybody."""
    held = [head for head in heads if head is not None]
    if not held:
        return None

    def mean(parts: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        return np.asarray(np.sum(parts, axis=0, dtype=np.float64) / len(heads), np.float32)

    return Head(mean([head.weight for head in held]), mean([head.bias for head in held]))
