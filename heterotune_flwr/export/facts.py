"""What an export folder says of itself: ``heterotune.json``, and which models lie where."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heterotune_flwr.backbones.files import hash_file
from heterotune_flwr.errors import ConfigError, ExchangeError, one_line
from heterotune_flwr.exchange.storage import atomic_write_text
from heterotune_flwr.fields import kinds
from heterotune_flwr.jsons import parse_json, read_as
from heterotune_flwr.protocol.metrics import MODEL_TITLES
from heterotune_flwr.tuning.kept_model import ALONE, FEDERATED, KeptFacts, read_facts

#: Raised when what stands in the file changes its meaning.
FORMAT = 1
FILE = "heterotune.json"
#: What cards and tables call the models.
LONG_TITLES = {**MODEL_TITLES, ALONE: "trained alone"}
#: The weights of an adapter folder; no other form of them is ever read.
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class ExportFacts:
    """What stands in ``heterotune.json``.

    Attributes
    ----------
    record
        Facts of the kept record; of a whole type without what is one client's own.
    model
        What the folder itself holds: ``federated`` or ``alone``; others lie in folders of their names.
    clients
        Of how many clients it is: 1, or a type's.
    whole_type
        Whether it is the model that a type shares.
    bytes
        What travelled for one client in a round (``up``, ``down``); empty where it is not known here.
    outside
        What the reported model adds that the adapter's files do not hold: ``prior``.
    conversion
        Of a form that needs nothing of ours what became of the model (:class:`.convert.Conversion`); empty of our own.
    digests
        SHA-256 (hex) of every file of adapter weights, by its path in the folder.

    """

    record: KeptFacts
    model: str = FEDERATED
    clients: int = 1
    whole_type: bool = False
    bytes: dict[str, float] = field(default_factory=dict)
    outside: list[str] = field(default_factory=list)
    conversion: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write the file."""
        atomic_write_text(folder / FILE, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> ExportFacts:
        """Read an export folder's facts (ConfigError: it is none, or of another version)."""
        path = folder / FILE
        if not path.is_file():
            raise ConfigError(
                f"{folder} is no exported model: it has no {FILE}; make one with: heterotune export RUN OUT"
            )
        try:
            plain = parse_json(path.read_text())
            if plain.pop("format", None) != FORMAT:
                raise ValueError(f"this version reads format {FORMAT}")
            return _checked(cls(**{**plain, "record": read_facts(plain["record"])}))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ExchangeError) as error:
            reason = one_line(error)
            raise ConfigError(f"{path} cannot be read: {reason}") from error

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the file."""
        return {"format": FORMAT, **dataclasses.asdict(self)}


def _checked(facts: ExportFacts) -> ExportFacts:
    """The facts, if each is of its kind (ValueError: one is not)."""
    if facts.model not in (FEDERATED, ALONE):
        raise ValueError(f"model is {str(facts.model)[:20]!r}, neither {FEDERATED} nor {ALONE}")
    plain = {name: kind for name, kind in kinds(ExportFacts).items() if name != "record"}
    found = {name: read_as(kind, getattr(facts, name), name) for name, kind in plain.items()}
    if found["clients"] < 1 or set(found["bytes"]) not in (set(), {"up", "down"}):
        raise ValueError("clients is below 1, or bytes has not just up and down")
    read_as(str, facts.conversion.get("form", ""), "conversion.form")
    return dataclasses.replace(facts, **found)


def models_in(folder: Path) -> dict[str, Path]:
    """The trained models of an export folder (``federated``, ``alone``), each by the adapter folder it lies in.

    The first is the one that the folder itself is. ConfigError: it is no export folder, or not whole.
    """
    facts = ExportFacts.load(folder)
    if form := facts.conversion.get("form"):
        raise ConfigError(
            f"{folder} was exported --as {form}, for other programs; its README.md says how it is loaded and how well "
            "it stands for its model. Here an export without --as is read"
        )
    found = {facts.model: folder}
    for name in (FEDERATED, ALONE):
        if name not in found and (folder / name / "adapter_config.json").is_file():
            found[name] = folder / name
    for path in found.values():
        if not (path / WEIGHTS).is_file():  # PEFT would read a pickle in its place
            raise ConfigError(f"{path} has no {WEIGHTS}: no other file of weights is read")
        name = (path / WEIGHTS).relative_to(folder).as_posix()
        if facts.digests.get(name) != hash_file(path / WEIGHTS):
            raise ConfigError(
                f"{path / WEIGHTS} is not the file that {FILE} names: it is damaged or was changed; export it again"
            )
    return found
