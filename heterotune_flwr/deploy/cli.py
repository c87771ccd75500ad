"""``heterotune deploy ...`` on the server and ``heterotune node ...`` on the lab machines."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from heterotune_flwr.cli_help import App
from heterotune_flwr.completion import presets
from heterotune_flwr.errors import ConfigError

deploy_app = App(
    no_args_is_help=True,
    help="Set up and run a deployment: TLS, node keys, start scripts, systemd units, proxy (docs/deploy.md).",
)
node_app = App(
    no_args_is_help=True, help="On a lab machine: make its key, check it, join the federation."
)
Folder = Annotated[Path, typer.Argument(help="the deployment folder", metavar="DIR")]
NodeName = Annotated[str, typer.Argument(help="name of the node", metavar="NAME")]
Settings = Annotated[Path, typer.Argument(help="the node's settings (or the folder with them)")]
PublicKeys = Annotated[
    list[Path] | None,
    typer.Option(
        "--public-keys",
        help="NAME.pub of a node that made its own key (heterotune node key NAME): only this half comes here",
    ),
]


@deploy_app.command()
def init(
    folder: Folder,
    server: Annotated[
        list[str] | None,
        typer.Option(
            "--server",
            help="HOST[:PORT] where nodes connect [port 8443]; given again: further names of it",
        ),
    ] = None,
    node: Annotated[
        list[str] | None, typer.Option("--node", help="name of a node, once for each")
    ] = None,
    public_keys: PublicKeys = None,
    days: Annotated[
        float | None,
        typer.Option("--days", min=0.01, help="validity of the server certificate [365]"),
    ] = None,
    renew: Annotated[
        bool, typer.Option("--renew", help="make a new server certificate (nodes need nothing new)")
    ] = False,
    internal_port: Annotated[
        int | None,
        typer.Option("--internal-port", help="of the SuperLink on the loopback interface [9093]"),
    ] = None,
    user: Annotated[
        str | None, typer.Option("--user", help="user of the systemd services [heterotune]")
    ] = None,
    node_folder: Annotated[
        str | None,
        typer.Option(
            "--node-dir", help="where nodes will keep their folder [/opt/heterotune/node]"
        ),
    ] = None,
    node_bin: Annotated[
        str | None,
        typer.Option(
            "--node-bin", help="folder of `heterotune` on nodes [/opt/heterotune/venv/bin]"
        ),
    ] = None,
) -> None:
    """Make a deployment folder, or bring one up to date; keys that are there are never overwritten."""
    from heterotune_flwr.deploy.certificates import SERVER_DAYS
    from heterotune_flwr.deploy.explain import explain
    from heterotune_flwr.deploy.folder import initialise
    from heterotune_flwr.deploy.keys import read_public

    deployment = initialise(
        folder, server or [], node or [], {path.stem: read_public(path) for path in public_keys or []},
        days or SERVER_DAYS, renew, internal_port=internal_port, user=user, node_folder=node_folder, node_bin=node_bin,
    )  # fmt: skip
    typer.echo(explain(deployment))
    if renew:
        typer.echo("the server certificate is new: restart the SuperLink and reload nginx")
    typer.echo(f"next: start the SuperLink, then: heterotune deploy register {folder}")


@deploy_app.command("add-node")
def add_node(folder: Folder, name: NodeName, public_keys: PublicKeys = None) -> None:
    """Add a node to a deployment; register it afterwards."""
    from heterotune_flwr.deploy.folder import write_folder
    from heterotune_flwr.deploy.keys import read_public
    from heterotune_flwr.deploy.layout import Deployment

    line = read_public(_single(public_keys)) if public_keys else None
    with Deployment.change(folder) as deployment:
        added = deployment.add_node(name, line)
        if not added and deployment.nodes[name].revoked:
            raise ConfigError(
                f"node {name} is revoked; let it in again under a new key with: heterotune deploy rotate-key "
                f"{folder} {name}"
            )
        write_folder(deployment)
    if not added:
        typer.echo(f"node {name} was there already")
    typer.echo(
        f"copy {deployment.node(name)} to the node; then: heterotune deploy register {folder}"
    )


@deploy_app.command()
def register(folder: Folder) -> None:
    """Let the nodes in that are not registered yet, and mend what does not agree (the SuperLink must run).

    Bars keys that have been rotated or revoked and are still let in; says which nodes Flower lets in that are not of
    this deployment.
    """
    from heterotune_flwr.deploy.explain import describe
    from heterotune_flwr.deploy.layout import Deployment
    from heterotune_flwr.deploy.registry import reconcile

    with Deployment.change(folder) as deployment:
        outcome = reconcile(deployment)
    typer.echo(describe(deployment, outcome))
    if outcome.troubles:
        raise typer.Exit(1)


@deploy_app.command("revoke-node")
def revoke_node(folder: Folder, name: NodeName) -> None:
    """Bar a node: its key is refused from now on."""
    from heterotune_flwr.deploy.layout import Deployment
    from heterotune_flwr.deploy.registry import revoke

    with Deployment.change(folder) as deployment:
        revoke(deployment, name)
    typer.echo(
        f"revoked {name}; let it in again, under a new key, with: heterotune deploy rotate-key {folder} {name}"
    )


@deploy_app.command("rotate-key")
def rotate_key(folder: Folder, name: NodeName, public_keys: PublicKeys = None) -> None:
    """Give a node a new key: the new one is registered, then the old one barred."""
    from heterotune_flwr.deploy.layout import Deployment
    from heterotune_flwr.deploy.rotation import rotate_key as rotate

    with Deployment.change(folder) as deployment:
        fingerprint = rotate(deployment, name, _single(public_keys) if public_keys else None)
    typer.echo(f"node {name} is now known by {fingerprint}")
    if not public_keys:
        typer.echo(f"copy {deployment.node(name) / 'node.key'} to the node and restart it there")


@deploy_app.command("run")
def run_app(
    folder: Folder,
    config: Annotated[
        str | None,
        typer.Argument(
            help="a preset (see `heterotune config`) or a YAML file [demo]", autocompletion=presets
        ),
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted overrides")] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="go on with the run in this directory")
    ] = None,
) -> None:
    """Start a run on the nodes that are online, with the code installed here; returns at once."""
    from heterotune_flwr.deploy.layout import Deployment
    from heterotune_flwr.deploy.submit import submit

    run = submit(Deployment.load(folder), config, overrides or [], resume)
    typer.echo(f"run {run.run_id} is submitted; it writes to {run.directory}")
    typer.echo(f"follow it with: heterotune status {shlex.quote(str(run.directory))}")


@deploy_app.command()
def show(folder: Folder) -> None:
    """Explain every file of a deployment folder, and list its nodes."""
    from heterotune_flwr.deploy.explain import explain
    from heterotune_flwr.deploy.layout import Deployment

    typer.echo(explain(Deployment.load(folder)))


@node_app.command()
def key(
    name: Annotated[str, typer.Argument(help="name of the node")],
    folder: Annotated[Path, typer.Option("--dir", help="where to put it")] = Path(),
) -> None:
    """Make this node's key here; only the public half goes to the operator."""
    from heterotune_flwr.deploy.files import make_folder, present, write_file
    from heterotune_flwr.deploy.keys import (
        check_node_name,
        key_fingerprint,
        new_node_key,
        node_key,
        read_public,
    )

    check_node_name(name)
    shared = make_folder(folder) / f"{name}.pub"
    # A key without its public half is of a call that was cut short; any other is in use.
    make = new_node_key if present(shared, "the public key") else node_key
    line = read_public(make(folder, name))
    write_file(shared, line)
    typer.echo(f"{folder / 'node.key'}: stays on this machine; never send it anywhere")
    typer.echo(f"{shared}: send it to the operator ({key_fingerprint(line)})")


@node_app.command()
def check(
    settings: Settings = Path("node.toml"),
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="leave out what needs the server")
    ] = False,
) -> None:
    """Tell whether this machine is ready to join; exit code 1 if anything is in the way."""
    from heterotune_flwr.deploy.findings import ready, render, to_json
    from heterotune_flwr.deploy.node_check import check_node

    findings = check_node(settings, offline)
    verdicts = "ready to join: heterotune node start", "not ready"
    typer.echo(to_json(findings) if as_json else render(findings, *verdicts))
    if not ready(findings):
        raise typer.Exit(1)


@node_app.command()
def start(settings: Settings = Path("node.toml")) -> None:
    """Become the SuperNode of this machine (this process is replaced by flower-supernode)."""
    from heterotune_flwr.deploy import executor_watch
    from heterotune_flwr.deploy.node_config import read_node_settings, supernode_command

    node = read_node_settings(settings)
    command = supernode_command(node)
    # A folder without code: it is on the search path of what is started here.
    os.chdir(node.state_dir)
    executor_watch.start()
    os.execve(command[0], command, node.environment())


def _single(paths: list[Path] | None) -> Path:
    if not paths or len(paths) != 1:
        raise ConfigError("give --public-keys once, for this node")
    return paths[0]
