"""What the ClientApp calls: answer a message in this process, or let the worker do it?

No torch is imported here. A simulation answers in its own processes, which live as long as the
run; a deployed client, whose process lives for one message, asks the worker of its state directory
unless its node configuration says ``worker="off"`` or the environment ``HETEROTUNE_WORKER=off``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from heterotune_flwr.client.identify import is_simulated
from heterotune_flwr.client.node_keys import CLIENT
from heterotune_flwr.client.redaction import told
from heterotune_flwr.errors import ConfigError, HeteroTuneError
from heterotune_flwr.flower import Context, Message, content_from_bytes, content_to_bytes
from heterotune_flwr.names import printable
from heterotune_flwr.protocol.wire import error_content
from heterotune_flwr.quiet import hush

log = logging.getLogger(__name__)

ENVIRONMENT = "HETEROTUNE_WORKER"


def answer(message: Message, context: Context) -> Message:
    """Answer a message of the wire contract; an error becomes a one-line reply."""
    try:
        if not uses_worker(context.node_config):
            return _here(message, context)
        from heterotune_flwr.worker.places import WorkerUnavailableError

        try:
            return Message(_there(message, context), reply_to=message)
        except WorkerUnavailableError as error:
            log.warning("working without the worker: %s", error)
            return _here(message, context)
    except HeteroTuneError as error:
        log.error("%s: %s", message.metadata.message_type, printable(str(error)))
        name = str(context.node_config.get("client-id") or "")
        content = error_content(told(error, context.node_config), client_id=name)
        return Message(content, reply_to=message)


def uses_worker(node_config: Mapping[str, Any]) -> bool:
    """Whether a node's messages go to the worker (ConfigError: the setting is neither ``on`` nor ``off``)."""
    if is_simulated(node_config) or not node_config.get("state-dir") or os.name != "posix":
        return False
    settings = {
        "worker in the node configuration": node_config.get("worker", CLIENT["worker"].default),
        ENVIRONMENT: os.environ.get(ENVIRONMENT) or "on",
    }
    for where, value in settings.items():
        if value not in ("on", "off"):
            raise ConfigError.of(where, value, "choose on or off")
    return "off" not in settings.values()


def idle_seconds(node_config: Mapping[str, Any]) -> float:
    """Idle time after which the worker ends (``worker-idle-minutes``, default 30).

    Raises ConfigError: it is not a positive number.
    """
    given = node_config.get("worker-idle-minutes", CLIENT["worker-idle-minutes"].default)
    try:
        minutes = float(given)
    except (TypeError, ValueError):
        minutes = 0.0
    if not 0.0 < minutes < 1e6:
        raise ConfigError.of(
            "worker-idle-minutes in the node configuration", given, "give a number of minutes"
        )
    return 60.0 * minutes


def _here(message: Message, context: Context) -> Message:
    """Answer in this process; torch comes in here."""
    if not context.run_config.get("debug"):
        hush()
    from heterotune_flwr.client import handlers as client

    return client.respond(message, context, client.HANDLERS[message.metadata.message_type])


def _there(message: Message, context: Context) -> Any:
    from heterotune_flwr.worker.link import submit
    from heterotune_flwr.worker.places import Place

    idle = idle_seconds(context.node_config)
    header = {
        "kind": "job",
        "type": message.metadata.message_type,
        "run_id": context.run_id,
        "node_id": context.node_id,
        "run_config": dict(context.run_config),
        "node_config": dict(context.node_config),
        "cwd": str(Path.cwd()),
        "idle_seconds": idle,
    }
    place = Place.of(str(context.node_config["state-dir"]))
    reply = submit(place, header, content_to_bytes(message.content), idle)
    return content_from_bytes(reply)
