"""Flower's registrations, in memory: a key is unknown, let in, or barred for ever."""

from __future__ import annotations

import itertools

from heterotune_flwr.deploy import registry, rotation
from heterotune_flwr.deploy.keys import key_body
from heterotune_flwr.deploy.registry import Listed
from heterotune_flwr.errors import FederationError


class Killed(BaseException):
    """The command has been killed."""


class FakeFlower:
    """Stands for ``flwr supernode ...``; ``kill_at`` ends the command at the so-manieth call, before or after it.

    ``refused`` is the body of a key that cannot be registered.
    """

    def __init__(self) -> None:
        self.keys: dict[str, Listed] = {}
        self.on = True
        self.refused = ""
        self.kill_at, self.after = 0, False
        self._calls, self._ids = 0, itertools.count(100)

    def install(self, monkeypatch) -> None:
        monkeypatch.setattr(registry, "flwr", self.flwr)
        for module in (registry, rotation):
            monkeypatch.setattr(module, "listed", self.listed)

    def step(self) -> None:
        """Count something that a command does; it may be its last."""
        self._calls += 1
        if self._calls == self.kill_at:
            raise Killed

    def restart(self, kill_at: int = 0, after: bool = False) -> None:
        """Count from the beginning."""
        self._calls, self.kill_at, self.after = 0, kill_at, after

    def live(self) -> set[str]:
        """Keys that get in."""
        return {body for body, entry in self.keys.items() if entry.live}

    def listed(self, _) -> dict[str, Listed]:
        self._answers()
        return dict(self.keys)

    def flwr(self, _, area: str, verb: str, what: str) -> dict[str, str]:
        assert area == "supernode"
        self._answers()
        if not self.after:
            self.step()
        answer = self._register(what) if verb == "register" else self._unregister(what)
        if self.after:
            self.step()
        return answer

    def _answers(self) -> None:
        if not self.on:
            raise FederationError("the SuperLink does not answer")

    def _register(self, file: str) -> dict[str, str]:
        with open(file) as stream:
            body = key_body(stream.read())
        if body == self.refused:
            raise FederationError("refused")
        if body in self.keys:
            raise FederationError("[code: 23] Public key already in use.")
        self.keys[body] = Listed(str(next(self._ids)), True)
        return {"node-id": self.keys[body].node_id}

    def _unregister(self, node_id: str) -> dict[str, str]:
        for body, entry in self.keys.items():
            if entry == Listed(node_id, True):
                self.keys[body] = Listed(node_id, False)
                return {}
        raise FederationError("[code: 24] Node ID not found for account.")
