"""What a client keeps after its last round: what it may take home, and what is known about it.

One folder a client and experiment, ``<state dir>/kept/<experiment>/<client id>/``: ``kept.json``, and beside it
``federated.safetensors``, ``shared.safetensors`` and ``alone.safetensors`` (adapter tensors under canonical names) and
``head.safetensors`` where there are such. Maps lie where they are (:meth:`.client_state.ClientStore.load_maps`).
Nothing else reads or writes these files.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from heterotune_flwr import __version__
from heterotune_flwr.backbones.assets import cache_dir
from heterotune_flwr.errors import ExchangeError, one_line
from heterotune_flwr.exchange.packing import tensor_digest
from heterotune_flwr.exchange.storage import atomic_write_text, load_tensors, save_tensors
from heterotune_flwr.jsons import parse_json, read_as
from heterotune_flwr.names import is_file_name, safe_text
from heterotune_flwr.program_version import code_hash
from heterotune_flwr.protocol.metrics import ALONE, BARE, FEDERATED, MODELS
from heterotune_flwr.tuning.kept_facts import (
    BEFORE_OWN_ROUNDS,
    FORMAT,
    Choosing,
    KeptBackbone,
    KeptFacts,
    KeptForm,
    Measured,
    read_facts,
)

__all__ = [
    "ALONE", "BARE", "FEDERATED", "FOLDER", "MODELS", "Choosing", "Head", "Kept", "KeptBackbone", "KeptFacts",
    "KeptForm", "KeptModel", "Measured", "find_kept", "kept_folder", "read_facts",
]  # fmt: skip
FOLDER = "kept"
_FACTS = "kept.json"
#: Parts of a record that are tensors, each in a file of its name.
_PARTS = (FEDERATED, "shared", ALONE, "head")

Tensors = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Head:
    """What channels add to the labels' logits: ``weight`` (C x places r) times bare latents, and ``bias`` (C).

    The latents are those of the bare backbone at :func:`..alignment.views.classifier_places`, one after the other.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class KeptModel(KeptFacts):
    """A client's kept record: the facts, and the tensors they are about.

    ``federated`` and ``alone`` are adapter tensors by canonical name; ``alone`` is None where there is no such model,
    ``head`` where channels add nothing that is linear. ``shared`` is ``federated`` before its own rounds, None without.
    """

    federated: Tensors = field(default_factory=dict)
    shared: Tensors | None = None
    alone: Tensors | None = None
    head: Head | None = None

    @property
    def facts(self) -> KeptFacts:
        """The record without its tensors."""
        return KeptFacts(**_facts(self))

    @property
    def as_shared(self) -> Tensors:
        """The federated model as the run left it, before own rounds."""
        return self.federated if self.shared is None else self.shared

    def save(self, folder: Path) -> None:
        """Replace what the folder holds; a crash on the way leaves it without a record, never with a mixed one."""
        facts = dataclasses.asdict(self.facts)
        (folder / _FACTS).unlink(missing_ok=True)
        digests = {}
        for name, tensors in self._tensors().items():
            if tensors is None:
                _file(folder, name).unlink(missing_ok=True)
            else:
                save_tensors(_file(folder, name), tensors)
                digests[name] = tensor_digest(tensors)
        plain = {**facts, "digests": digests, "program": f"{__version__}, code {code_hash()}"}
        atomic_write_text(folder / _FACTS, json.dumps(plain, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> KeptModel:
        """Read a folder that :meth:`save` wrote.

        Raises
        ------
        ExchangeError
            A file is missing, damaged, of another version, or not of this record; one line that names it.

        """
        facts, digests = _read(folder)
        held: dict[str, Tensors] = {}
        for name, digest in digests.items():
            held[name] = load_tensors(_file(folder, name))
            if tensor_digest(held[name]) != digest:
                raise _damaged(_file(folder, name), f"its tensors are not those of {_FACTS}")
        head = held.get("head")
        whole = FEDERATED in held and ("shared" in held) == (facts.own_rounds > 0)
        if not whole or (head is not None and set(head) != {"weight", "bias"}):
            raise _damaged(folder / _FACTS, "it does not name the adapter's tensors")
        return cls(
            **_facts(facts),
            federated=held[FEDERATED],
            shared=held.get("shared"),
            alone=held.get(ALONE),
            head=None if head is None else Head(head["weight"], head["bias"]),
        )

    def _tensors(self) -> dict[str, Tensors | None]:
        head = None
        if self.head is not None:
            head = {"weight": self.head.weight, "bias": self.head.bias}
        return {FEDERATED: self.federated, "shared": self.shared, ALONE: self.alone, "head": head}


@dataclass(frozen=True)
class Kept:
    """A record that was found: its folder, what it says (without the tensors), and when it was written."""

    folder: Path
    facts: KeptFacts
    saved: float

    def load(self) -> KeptModel:
        """The record with its tensors (ExchangeError as :meth:`KeptModel.load`)."""
        return KeptModel.load(self.folder)


def kept_folder(state_dir: Path, experiment: str, client_id: str) -> Path:
    """Where a client's record lies (ExchangeError: a name that could leave the state-dir)."""
    for name in (experiment, client_id):
        if not is_file_name(name):
            raise ExchangeError(f"{name[:80]!r} cannot name a folder; use letters, digits, - and _")
    return state_dir / FOLDER / experiment / client_id


def find_kept(
    where: Path,
    *,
    strategy: str | None = None,
    seed: int | None = None,
    type_key: str | None = None,
    client: str | None = None,
    skip: Callable[[Path, ExchangeError], None] | None = None,
) -> list[Kept]:
    """Records of a run directory or a state-dir that fit what is asked; by experiment and client.

    Parameters
    ----------
    where
        A run directory (its own records alone are found, wherever its clients keep their state), or a state-dir.
    strategy, seed, type_key, client
        What must be so; None: anything.
    skip
        Is told of folders whose record cannot be read; they are passed over.

    Raises
    ------
    ExchangeError
        A record cannot be read, without ``skip``; one line that names it.

    """
    state_dir, begins = _state_dir(where)
    wanted = {"strategy": strategy, "seed": seed, "type_key": type_key, "client_id": client}
    found = []
    for path in sorted((state_dir / FOLDER).glob(f"*/*/{_FACTS}")):
        if not path.parent.parent.name.startswith(begins):
            continue
        try:
            facts, _ = _read(path.parent)
        except ExchangeError as error:
            if skip is None:
                raise
            skip(path.parent, error)
            continue
        if all(value is None or getattr(facts, name) == value for name, value in wanted.items()):
            found.append(Kept(path.parent, facts, path.stat().st_mtime))
    return found


def _state_dir(where: Path) -> tuple[Path, str]:
    """Where the clients of a run keep their state, and how the names of its experiments begin."""
    named, config = where / "run.json", where / "config.yaml"
    if not named.exists():
        return where, ""
    try:
        name = str(parse_json(named.read_text())["name"])
        settings = yaml.safe_load(config.read_text()) if config.exists() else {}
        given = (settings.get("run") or {}).get("state_dir")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise _damaged(where, f"it is no run directory: {_line(error)}") from error
    if given:
        return Path(str(given)).expanduser(), f"{name}-"
    if (where / "state").is_dir():
        return where / "state", f"{name}-"
    return cache_dir() / "state" / f"run-{name.rpartition('-')[2]}", f"{name}-"


def _facts(record: KeptFacts) -> dict[str, Any]:
    return {f.name: getattr(record, f.name) for f in dataclasses.fields(KeptFacts)}


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def _damaged(path: Path, why: str) -> ExchangeError:
    return ExchangeError(f"{path} cannot be read as a kept model: {why}")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def _read(folder: Path) -> tuple[KeptFacts, dict[str, str]]:
    """The facts of a folder, and the digests of its tensors."""
    path = folder / _FACTS
    try:
        plain = parse_json(path.read_text())
    except FileNotFoundError as error:
        raise _damaged(path, "there is no such file") from error
    except (OSError, ValueError) as error:
        raise _damaged(path, _line(error)) from error
    if not isinstance(plain, dict):
        raise _damaged(path, "it is no JSON object")
    writer = safe_text(str(plain.pop("program", "unknown")), 60)
    try:
        if plain.get("format") not in (BEFORE_OWN_ROUNDS, FORMAT):
            there = str(plain.get("format"))[:20]
            raise ValueError(f"its format is {there}, this version reads {FORMAT}")
        digests = read_as(dict[str, str], plain.pop("digests", None), "digests")
        facts = read_facts(plain)
        if set(digests) - set(_PARTS):
            raise ValueError("it names a model that this version does not know")
    except ValueError as error:
        mend = (
            f"heterotune-flwr {writer} wrote it and reads it; or let the run write it anew with this version: "
            "heterotune run --resume RUN_DIR, with one more of server.rounds"
        )
        raise _damaged(path, f"{error} ({mend})") from error
    return facts, digests
