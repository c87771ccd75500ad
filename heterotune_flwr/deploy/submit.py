"""``heterotune deploy run``: this installation's code and a configuration, handed to the SuperLink as one run."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import typer
from omegaconf import OmegaConf

from heterotune_flwr.client.identify import about_shipped
from heterotune_flwr.config.asked import asked_of
from heterotune_flwr.config.compose import INLINE, compose, to_yaml
from heterotune_flwr.config.shipped import conf_root, presets
from heterotune_flwr.deploy.layout import Deployment
from heterotune_flwr.deploy.registry import CONNECTION, flwr
from heterotune_flwr.deploy.submitted import Submitted, flwr_words, remember
from heterotune_flwr.errors import ConfigError, LeftRunningError
from heterotune_flwr.experiment import run_directory, with_absolute_paths
from heterotune_flwr.federation.launcher import check_directory
from heterotune_flwr.federation.resume import check_resumable
from heterotune_flwr.federation.staging import stage_app
from heterotune_flwr.programs import to_toml
from heterotune_flwr.schema import Config
from heterotune_flwr.strategies.build import check_strategies
from heterotune_flwr.track.trackers import check_trackers


def submit(
    deployment: Deployment, config: str | None, overrides: Sequence[str], resume: Path | None
) -> Submitted:
    """Check a configuration as far as the server can and submit it; returns without waiting for the run.

    Raises ConfigError: the configuration is wrong, or the run directory belongs to another run; FederationError: the
    SuperLink does not answer or refuses the run.

    Parameters
    ----------
    deployment
        Whose SuperLink.
    config
        A preset, which then takes the patience of ``conf/server/deployment.yaml``, or a YAML file, which says all
        itself. ``types`` are ignored: nodes say what they are, and where nothing says how many to wait for, it is two.
    overrides
        Dotted overrides.
    resume
        Run directory to go on with instead; ``overrides`` may then change only what a resumed run may.

    """
    if resume is not None:
        given = [*([config] if config is not None else []), *overrides]
        settled, directory = check_resumable(resume, given, None), resume.expanduser().resolve()
    else:
        settled, directory = settle(deployment, config or "demo", overrides)
    asked = asked_of(None if resume is not None else config or "demo", overrides)
    text = INLINE + to_yaml(settled)
    compose(text, trusted=False)  # as every node will read it
    values = {
        "config": text,
        "overrides": "",
        "resume": "" if resume is None else str(directory),
        "asked": asked.to_text(),
    }
    with tempfile.TemporaryDirectory(prefix="heterotune-") as folder:
        app = stage_app(Path(folder) / "app")
        settings = Path(folder) / "run.toml"
        settings.write_text(to_toml(values))
        try:
            answer = flwr(
                deployment, "run", str(app), CONNECTION, "--run-config", str(settings), named=True
            )
        except KeyboardInterrupt as error:
            words = flwr_words(deployment.operator)
            raise LeftRunningError(
                "interrupted while the run was handed to the SuperLink: it may have it, and then the run goes on; "
                f"look with `{words} list {CONNECTION}`, end it with `{words} stop RUN_ID {CONNECTION}`"
            ) from error
    run_id = str(answer["run-id"])
    typer.echo(f"its log: {flwr_words(deployment.operator)} log {run_id} {CONNECTION}", err=True)
    submitted = Submitted(run_id, directory)
    remember(deployment.operator, submitted)
    return submitted


def settle(deployment: Deployment, config: str, overrides: Sequence[str]) -> tuple[Config, Path]:
    """Return the configuration of a new run of real nodes, and its run directory (ConfigError)."""
    shipped = OmegaConf.to_container(OmegaConf.load(conf_root() / "server" / "deployment.yaml"))
    assert isinstance(shipped, dict)
    patience = shipped["server"]
    if config in presets():
        overrides = [f"server.{key}={value}" for key, value in patience.items()] + list(overrides)
    settled = compose(config, overrides)
    if settled.server.min_clients is None:  # not the count of simulated clients
        settled.server.min_clients = patience["min_clients"]
    check_strategies(settled)
    check_trackers(settled.run.track)
    if not about_shipped(settled.data):
        typer.echo(
            "note: the run is about data of the nodes' own, so they are measured on their own tests alone (test in "
            "node.toml, and the examples they hold back), never on a shipped set",
            err=True,
        )
    if settled.run.dir is None:
        # Where the units let the ServerApp write.
        settled.run.dir = str(deployment.folder / "runs" / run_directory(settled).name)
    settled = with_absolute_paths(settled)
    directory = run_directory(settled)
    check_directory(directory)
    _check_place(directory, deployment)
    return settled, directory


def _check_place(directory: Path, deployment: Deployment) -> None:
    """Refuse a place where no folder can be made; say of one that the systemd units keep closed that they do."""
    place = next(parent for parent in (directory, *directory.parents) if parent.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".heterotune-", dir=place):
            pass
    except OSError as error:
        raise ConfigError(
            f"run.dir is {directory}, and no folder can be made in {place} ({error.strerror or error}); leave run.dir "
            f"out for one in {deployment.folder / 'runs'}"
        ) from error
    open_to_units = (deployment.folder / "runs", deployment.server / "state")
    if not any(directory.is_relative_to(folder.resolve()) for folder in open_to_units):
        typer.echo(
            f"note: {directory} is outside {open_to_units[0]}: a SuperExec started by its systemd unit cannot write "
            "there (ReadWritePaths)",
            err=True,
        )
