"""Runs from Python: the same checks, simulation and files as ``heterotune run``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console

from heterotune_flwr.config.asked import asked_of
from heterotune_flwr.config.compose import INLINE, compose
from heterotune_flwr.data.sources import columns_recognised
from heterotune_flwr.errors import ConfigError, FederationError
from heterotune_flwr.experiment import run_directory, with_absolute_paths
from heterotune_flwr.federation.launcher import check_directory, check_writable, launch
from heterotune_flwr.federation.resume import check_resumable, saved_config
from heterotune_flwr.preflight import preflight, settle_bits
from heterotune_flwr.reporting.progress import RunProgress
from heterotune_flwr.reporting.results import Results
from heterotune_flwr.schema import Config

if TYPE_CHECKING:
    from heterotune_flwr.export.model import Model


@dataclass(frozen=True)
class Run:
    """A run that has ended, by its directory; nothing of it is loaded before it is asked for."""

    directory: Path

    @cached_property
    def results(self) -> Results:
        """What it measured (FederationError: nothing yet)."""
        return Results.load(self.directory)

    @cached_property
    def config(self) -> Config:
        """The settings it was started with (ConfigError: they cannot be read any more)."""
        return saved_config(self.directory)

    def model(
        self,
        type: str | None = None,
        *,
        client: str | None = None,
        strategy: str | None = None,
        seed: int | None = None,
    ) -> Model:
        """A model of the run, loaded: what the clients of a type share, or what one client took home.

        Parameters
        ----------
        type, client
            One of them; a type may be named without its bits where that is clear.
        strategy, seed
            None: HeteroTune (else the last one that ran), the smallest seed.

        Raises
        ------
        ConfigError
            There is no such model; says what there is.
        BackboneError
            Its backbone is not here any more.

        """
        from heterotune_flwr.export.model import load_temporarily
        from heterotune_flwr.export.selection import select_of_run

        key = None if type is None else self.results.type_key(type)
        chosen = select_of_run(self.directory, strategy, seed, key, client)
        return load_temporarily(chosen.write)


def new_config(config: str, overrides: Sequence[str], directory: Path | None) -> Config:
    """The settings of a new run, with a directory of its own.

    Parameters
    ----------
    config, overrides
        As :func:`.config.compose.compose`.
    directory
        None: as configured, else below ``~/heterotune-runs``.

    Raises
    ------
    ConfigError
        A setting is wrong, or the directory cannot be used.
    BackboneError
        A backbone fits its memory at no bits.

    """
    resolved = compose(config, overrides)
    if directory is not None:
        resolved.run.dir = str(directory)
    place = run_directory(resolved)
    resolved.run.dir = str(place)
    resolved = with_absolute_paths(resolved)
    check_directory(place)
    check_writable(place)
    return settle_bits(resolved)  # every process of the run takes the same bits


def run(
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *overrides: str | Mapping[str, Any],
    rounds: int | None = None,
    strategies: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    directory: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Run:
    """Simulate a federation on this machine, as ``heterotune run`` does, and wait for its end.

    Parameters
    ----------
    config
        A preset's name, a YAML file, or what would stand in one as a mapping; None: ``demo``.
    overrides
        ``"train.learning_rate=1e-3"``, or ``{"train.learning_rate": 1e-3}``.
    rounds, strategies, seeds
        Short for ``server.rounds``, ``run.compare`` and ``run.seeds``.
    directory
        Where it writes; None: below ``~/heterotune-runs``.
    resume
        Go on with the run in this directory instead, after its last round; takes no ``config``.
    progress
        Print lines as it goes; False: nothing is printed.

    Raises
    ------
    HeteroTuneError
        Something is wrong with what was asked (before any work), or the run failed; one line that says how to mend it.

    """
    words = [word for given in overrides for word in _words(given)]
    short = {"server.rounds": rounds, "run.compare": strategies, "run.seeds": seeds}
    words += _words({key: value for key, value in short.items() if value is not None})
    if resume is None:
        place = None if directory is None else Path(directory)
        resolved = new_config(_named(config), words, place)
    else:
        asked = [] if config is None else [_named(config)]
        other = None if directory is None else Path(directory)
        resolved = check_resumable(Path(resume), [*asked, *words], other)
    notes = [*preflight(resolved), *columns_recognised(resolved.data)]
    with open(os.devnull, "w") as nowhere:
        shown_on = sys.stdout if progress else nowhere
        # Plain lines in a notebook, which would make a box of each, and says that it has colours.
        console = Console(file=shown_on, force_jupyter=False, force_terminal=shown_on.isatty())
        for line in notes:
            console.print(line, soft_wrap=True, highlight=False, markup=False)
        with RunProgress(resolved, console) as shown:
            said = asked_of(None if resume is not None else _named(config), words)
            outcome = launch(resolved, shown, resume is not None, notes, asked=said)
    if outcome.failed:
        raise FederationError(
            f"the run failed: {outcome.reason}; {outcome.directory / 'flower.log'} has more, "
            f"heterotune_flwr.run(resume={str(outcome.directory)!r}) goes on"
        )
    return Run(outcome.directory)


def open_run(directory: str | os.PathLike[str]) -> Run:
    """An earlier run, by its directory (ConfigError: it is none)."""
    place = Path(directory).expanduser().resolve()
    if not (place / "config.yaml").is_file():
        raise ConfigError(f"{place} is no run directory: it has no config.yaml")
    return Run(place)


def _named(config: str | os.PathLike[str] | Mapping[str, Any] | None) -> str:
    """A configuration as :func:`.config.compose.compose` takes it (ConfigError: no YAML can say it)."""
    if not isinstance(config, Mapping):
        return "demo" if config is None else os.fspath(config)
    try:
        return INLINE + yaml.safe_dump(dict(config), sort_keys=False)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"the configuration has a value that YAML cannot hold: {error}"
        ) from error


def _words(given: str | Mapping[str, Any]) -> list[str]:
    """Overrides as ``dotted.path=value``, values as JSON, which every setting reads back as it was."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, Mapping):
        raise ConfigError(f"an override is {given!r}; write 'key=value', or a mapping of keys")
    try:
        return [f"{key}={json.dumps(value, default=_plain)}" for key, value in given.items()]
    except TypeError as error:
        raise ConfigError(f"an override cannot be written as a setting: {error}") from error


def _plain(value: Any) -> Any:
    """What JSON has no word for: a path, a range, a number of numpy's."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Sequence):
        return list(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{value!r} is a {type(value).__name__}")
