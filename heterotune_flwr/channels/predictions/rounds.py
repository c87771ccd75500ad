"""Rounds about public texts, whatever is said of them: which texts, and who learns from whom (numpy only)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from heterotune_flwr.alignment.public_texts import anchor_digest, load_anchors
from heterotune_flwr.channels.channel import RunFacts, ServerChannel
from heterotune_flwr.channels.predictions.options import PredictionOptions


class Rounds(ServerChannel):
    """What the server's halves for labels and for open text have in common."""

    options: PredictionOptions

    def open(self, run: RunFacts) -> str | None:
        """Read the public texts; where there are fewer than the options say, all are used (DataError: none)."""
        options = self.options
        most = max(options.pool, options.guest_anchors)
        texts = load_anchors(dataclasses.replace(run.config.alignment, count=most))
        pool = min(options.pool, len(texts))
        self.options = dataclasses.replace(
            options, pool=pool, anchors=min(options.anchors, pool), guest_anchors=len(texts)
        )
        self.run = run
        #: Identity of the pool, and of all anchors that guests learn from.
        self.digests = {pool: anchor_digest(texts[:pool]), len(texts): anchor_digest(texts)}
        return None

    def group(self, type_key: str) -> str:
        """Name of those who learn from each other; "" where all do."""
        return type_key if self.options.pool_over == "type" else ""

    def groups(self, client_ids: Sequence[str]) -> dict[str, list[str]]:
        """Clients that learn from each other."""
        found: dict[str, list[str]] = {}
        for client_id in client_ids:
            found.setdefault(self.group(self.run.clients[client_id].type_key), []).append(client_id)
        return found

    def shares_by_type(self, shares: Mapping[str, float]) -> dict[str, float]:
        """Sum of clients' shares, by type."""
        found: dict[str, float] = {}
        for client_id, share in shares.items():
            key = self.run.clients[client_id].type_key
            found[key] = found.get(key, 0.0) + share
        return found
