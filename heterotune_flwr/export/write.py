"""From a kept record to an export folder: adapters, facts and a model card; whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from heterotune_flwr.backbones.files import hash_file
from heterotune_flwr.errors import ConfigError, ExchangeError
from heterotune_flwr.export.adapter_files import AdapterFiles, check_kind, write_adapter
from heterotune_flwr.export.card import model_card
from heterotune_flwr.export.facts import WEIGHTS, ExportFacts
from heterotune_flwr.tuning.client_state import ClientStore
from heterotune_flwr.tuning.kept_model import ALONE, BARE, FEDERATED, KeptFacts, KeptModel, Tensors


def check_out(out: Path) -> None:
    """Refuse to write over anything (ConfigError): ``out`` must be new or an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already and not empty; name a new folder")


def maps_of(state_dir: Path, facts: KeptFacts) -> Tensors:
    """The frozen maps of a record; none where its method has none (ExchangeError: they are gone or damaged)."""
    if not facts.maps_digest:
        return {}
    store = ClientStore(state_dir, facts.experiment, facts.client_id)
    found = store.load_maps(facts.maps_digest)
    if found is None:
        raise ExchangeError(
            f"the maps of this model are not in {state_dir / 'maps'} any more, or damaged: without them there is no "
            "model; run again"
        )
    return found


def write(
    kept: KeptModel,
    which: str | None,
    out: Path,
    *,
    maps: Tensors | None = None,
    clients: int = 1,
    whole_type: bool = False,
    travelled: Mapping[str, float] | None = None,
) -> ExportFacts:
    """Write an export folder.

    Parameters
    ----------
    kept
        The record.
    which
        ``federated`` or ``alone``: what the folder itself is; the other lies in a folder of its name. None: what the
        client took, and the federated model where it took its bare one.
    out
        A new or empty folder.
    maps
        The frozen maps of the record (:func:`maps_of`).
    clients, whole_type, travelled
        As in :class:`.facts.ExportFacts` (``travelled`` is ``bytes`` there).

    Raises
    ------
    ConfigError
        ``out`` holds something, there is no such model, or it has no form as an adapter.
    BackboneError
        The backbone is not here, or another one than the record's.

    """
    which = which or (FEDERATED if kept.took == BARE else kept.took)
    check_out(out)
    models = _models(kept, maps or {})
    if which not in models:
        raise ConfigError(f"there is no model {which!r} in this record, only {', '.join(models)}")
    facts = ExportFacts(
        record=kept.facts,
        model=which,
        clients=clients,
        whole_type=whole_type,
        bytes=dict(travelled or {}),
        outside=["prior"] if kept.method.kind == "lora" and kept.prior is not None else [],
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        made = Path(temporary) / "made"
        for name, files in models.items():
            write_adapter(kept, files, made if name == which else made / name)
        for readme in made.rglob("README.md"):  # PEFT's own, of an adapter it knows nothing about
            readme.unlink()
        put(facts, made, out)
    return facts


def _models(kept: KeptModel, maps: Tensors) -> dict[str, AdapterFiles]:
    """The trained models of a record (ConfigError: one has no form as an adapter)."""
    found = {FEDERATED: AdapterFiles(kept.federated, maps, kept.head, kept.prior)}
    if kept.alone is not None:
        found[ALONE] = AdapterFiles(kept.alone, maps, None, kept.prior)
    for files in found.values():
        check_kind(kept, files.tensors)
    return found


def put(facts: ExportFacts, made: Path, out: Path) -> None:
    """Put facts and their card into the folder ``made``, and that in the place of ``out``, new or empty."""
    weights = {path.relative_to(made).as_posix(): path for path in made.rglob(WEIGHTS)}
    digests = {name: hash_file(path) for name, path in sorted(weights.items())}
    replace(facts, digests=digests).save(made)
    (made / "README.md").write_text(model_card(facts), encoding="utf-8")
    if out.is_dir():
        out.rmdir()
    made.chmod(0o755)
    os.replace(made, out)
