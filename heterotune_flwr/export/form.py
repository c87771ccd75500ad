"""The settings of a kept record that say how its examples are written, as the rooms below take them."""

from __future__ import annotations

from dataclasses import asdict, fields

from heterotune_flwr.schema import DataConfig
from heterotune_flwr.tuning.kept_model import KeptFacts


def data_of(facts: KeptFacts, **further: object) -> DataConfig:
    """Data settings with a record's form and labels in them, and ``further`` ones."""
    known = {field.name for field in fields(DataConfig)}
    form = {name: value for name, value in asdict(facts.form).items() if name in known}
    return DataConfig(**{**form, "labels": facts.labels, **further})
