"""``heterotune worker``: start, look at, and stop the warm workers of this user."""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from heterotune_flwr.cli_help import App
from heterotune_flwr.errors import FederationError

app = App(
    no_args_is_help=True,
    help="Keep the backbones of a deployed client loaded between messages.\n\n"
    "Flower starts a new process for every message; the worker of a client's state directory "
    "outlives them, so that torch is imported and each backbone loaded once. The first message "
    "starts it and it ends by itself after 30 idle minutes: these commands are for looking and for "
    "tidying. Per node: --node-config '... worker=\"off\"' works without it, "
    "worker-idle-minutes=120 keeps it longer. Its log is <state-dir>/worker.log.",
)
StateDir = Annotated[
    Path | None,
    typer.Option("--state-dir", help="the client's state-dir, as in its node configuration"),
]


@app.command()
def start(
    state_dir: Annotated[
        Path, typer.Option("--state-dir", help="the client's state-dir, as in its node config")
    ],
    idle_minutes: Annotated[
        float, typer.Option("--idle-minutes", min=0.01, help="end after so long without a message")
    ] = 30.0,
) -> None:
    """Start the worker now, so that the first message need not wait for torch.

    Start it in the environment of the SuperNode (same Python, HETEROTUNE_CACHE,
    CUDA_VISIBLE_DEVICES): one with another environment is replaced by the first message.
    """
    from heterotune_flwr.worker.link import Link
    from heterotune_flwr.worker.places import Place
    from heterotune_flwr.worker.start import ensure

    place = Place.of(state_dir)
    with Link(ensure(place, 60.0 * idle_minutes)) as link:
        typer.echo(f"the worker of {place.state_dir} runs, pid {link.pid}; log: {place.log}")


@app.command()
def status(
    state_dir: StateDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object per worker")] = False,
) -> None:
    """Show the workers that run: what they have loaded, what they do, what they have done."""
    from heterotune_flwr.worker.places import runtime_dir

    found = [status for place in _places(state_dir) if (status := ask_status(place)) is not None]
    for entry in found:
        typer.echo(json.dumps(entry) if as_json else _describe(entry))
    if not found and not as_json:
        typer.echo(f"no worker runs (looked in {runtime_dir()})")


@app.command()
def stop(
    state_dir: StateDir = None,
    everyone: Annotated[bool, typer.Option("--all", help="all workers of this user")] = False,
    now: Annotated[
        bool,
        typer.Option("--now", help="do not wait for the job at work (a new worker does it again)"),
    ] = False,
) -> None:
    """Let the worker finish its job and end; returns when it has."""
    from heterotune_flwr.worker.link import find

    if (state_dir is None) == (not everyone):
        raise FederationError("say which worker to stop: --state-dir DIR, or --all")
    count = 0
    for place in _places(state_dir):
        link = find(place)
        if link is None:
            continue
        with link:
            if now and link.pid:
                with suppress(ProcessLookupError):
                    os.kill(link.pid, signal.SIGTERM)
            link.retire("heterotune worker stop")
        typer.echo(f"stopped the worker {link.pid}")
        count += 1
    if not count:
        typer.echo("no worker runs there")


def ask_status(place: Any) -> dict[str, Any] | None:
    """Return the status of the worker of a place, None when none runs."""
    from heterotune_flwr.worker.frames import PeerGoneError
    from heterotune_flwr.worker.link import find

    link = find(place)
    if link is None:
        return None
    with link:
        try:
            answer, _ = link.ask({"kind": "status"})
        except PeerGoneError:
            return None
    return {key: value for key, value in answer.items() if key != "kind"}


def _places(state_dir: Path | None) -> list[Any]:
    from heterotune_flwr.worker.places import Place, runtime_dir

    if state_dir is not None:
        return [Place.of(state_dir)]
    # The state directory of a socket is not known before its worker tells it.
    return [Place(Path(), path) for path in sorted(runtime_dir().glob("*.sock"))]


def _describe(status: dict[str, Any]) -> str:
    loads = ", ".join(
        f"{key} ({count['loads']} x, {count['bytes'] / 1e6:.1f} MB read)"
        for key, count in status["loads"].items()
    )
    job = status["current"]
    doing = (
        f"{job['type']} ({job['state']}) for {job['seconds']:.0f} s, {status['waiting']} waiting"
        if job
        else f"idle for {status['idle_seconds']:.0f} s, ends after "
        f"{status['idle_timeout_seconds'] / 60:.3g} idle minutes"
    )
    return "\n".join(
        [
            f"{status['state_dir']}",
            f"  pid        {status['pid']}, up {status['uptime_seconds']:.0f} s, "
            f"code {status['build']}, peak memory {status['peak_memory_mb']} MB",
            f"  backbones  {loads or 'none loaded yet'}",
            f"  jobs       {status['jobs_done']} done, {status['jobs_failed']} failed",
            f"  now        {doing}",
        ]
    )
