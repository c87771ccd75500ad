"""What a deployed node holds to whatever a run says, checked before any work (no torch here).

Whoever runs the server chooses the configuration, the numbers and the seeds of a run. Without floors that is enough to
read a node record by record: a test of one example, a step on one example, maps that read one number. What a floor
forbids is refused in one line (:class:`RefusedByNodeError`), which is no failure: the run goes on without the node.

:class:`Guard` is asked by the handlers (:mod:`.handlers`); nobody else checks any of this. What settings, adapters and
maps are usual at all, whoever asks, stands in :mod:`.bounds`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import secrets
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.channels.channel import client_half
from heterotune_flwr.channels.limits import LARGEST, TYPICAL, bounded, refuse, within
from heterotune_flwr.client.bounds import check_losses, check_maps, check_method, check_settings
from heterotune_flwr.client.floors import MOST_HELD, MOST_LOSS, Floors
from heterotune_flwr.errors import naming
from heterotune_flwr.protocol.messages import EvaluateRequest, Header, TrainRequest
from heterotune_flwr.protocol.metrics import metric_of
from heterotune_flwr.protocol.queries import AlignRequest, DescribeRequest
from heterotune_flwr.schema import Config

if TYPE_CHECKING:
    from heterotune_flwr.client.identity import Identity

Request = TypeVar("Request", DescribeRequest, AlignRequest, TrainRequest, EvaluateRequest)
Tensors = Mapping[str, NDArray[np.float32]]

#: Kinds of requests that are counted.
TRAINING, TEST, LABELS = "training", "test", "labels"
#: Decimals of a loss, and of whatever else is measured on examples.
_DECIMALS = 3
_EXACT = ("examples", "steps", "learning_rate")
#: Fields of a training request -> smallest and largest.
_TRAINING: dict[str, tuple[float, float]] = {
    "learning_rate": (0.0, 10.0),
    "proximal": (0.0, 1e3),
    "warmup_ratio": (0.0, 1.0),
}
#: Folders of a state-dir that runs fill.
_KEPT = ("clients", "maps", "states", "kept")


@dataclass(frozen=True)
class Guard:
    """One node's floors against one run's requests; of a simulated client it lets everything pass.

    Every method raises :class:`RefusedByNodeError` where what is asked goes below the floors.
    """

    identity: Identity
    config: Config

    def admit(self, request: Request) -> Request:
        """The request as far as this node answers it, before anything of it is kept or computed.

        Of a test some scopes may be left out, of which this node says nothing; another client of its type can be asked.
        """
        floors = self.identity.floors
        if floors is None:
            return request
        self._run(request.header, floors)
        if isinstance(request, EvaluateRequest):
            self._numbers(request)
            return replace(request, test_sets=self._told(request, floors))
        if isinstance(request, TrainRequest | DescribeRequest):
            rows = len(self.identity.examples(request.header.seed).train)
            self._rows(rows, floors)
            if isinstance(request, TrainRequest):
                self._work(request, rows, floors)
                self._numbers(request)
        return request

    def charge(
        self, request: TrainRequest | EvaluateRequest, *start: Tensors, tests: bool = False
    ) -> None:
        """Take an admitted request off the budget of the files it reads; what was answered before is free.

        The same request with the same ``start`` (values, and the node's own control variates) has the same answer, so
        asking again brings nothing and costs nothing: neither does a resumed run. ``tests``: a training is a test as
        well, by what a channel tells of it.
        """
        identity, floors = self.identity, self.identity.floors
        if floors is None:
            return
        asked = [request, *start, self.config.data, self.config.train, self.config.exchange]
        budgets = [(TEST, floors.tests, "tests")]
        if isinstance(request, TrainRequest):
            files = [] if identity.guest else [identity.data.train]
            training = (TRAINING, floors.trainings, "trainings")
            budgets = [*budgets, training] if tests else [training]
        else:
            own = self._own(request.test_sets)
            keeping = [identity.data.train] if request.keep_as else []
            files = keeping + [
                identity.data.train if name == "personal" else identity.data.test for name in own
            ]
        for path in filter(None, files):
            digest = _digest([*asked, identity.stamp(path)])
            for kind, most, key in budgets:
                if not identity.book.charge(identity.account(path), kind, digest, most):
                    self._spent(kind, most, key)

    def charge_alone(self, rounds: int) -> bool:
        """Take the rounds of a training alone off the budget of trainings; False, and none of it, where it is spent.

        Each counts, also one repeated: what is bounded is the work, as nothing of the model leaves but its tests.
        """
        identity, floors = self.identity, self.identity.floors
        if floors is None or identity.data.train is None:
            return True
        account = identity.account(identity.data.train)
        if identity.book.spent(account, TRAINING) + rounds > floors.trainings:
            return False
        once = secrets.token_hex(16)
        names = (f"alone {once} {number}" for number in range(rounds))
        return all(identity.book.charge(account, TRAINING, n, floors.trainings) for n in names)

    def steps(self, rows: int) -> tuple[int, int]:
        """How many of so many examples a training leaves out, and how many a step is on.

        No two trainings, steps or passes over the examples may differ by a single one: their difference would be its
        gradient. So some are left out, others each time, and the rest is divided into equal steps without remainder.
        """
        floors, size = self.identity.floors, self.config.train.batch_size
        if floors is None or not rows:
            return 0, size
        used = rows - floors.step_examples
        counts = range(max(1, used // size), 0, -1)
        count = next((n for n in counts if used - used % n >= floors.round_examples), 1)
        return rows - used // count * count, used // count

    def own_test(self, scope: str) -> bool:
        """Whether a test is of a deployed node's own rows."""
        return self.identity.floors is not None and bool(self._own([scope]))

    def tells_choice(self, examples: int) -> bool:
        """Whether it may leave a node which model it took by so many examples: it is a test of them."""
        floors = self.identity.floors
        return floors is None or examples >= floors.test_examples

    def details(self, request: EvaluateRequest) -> list[str]:
        """What beyond means of the last test leaves this client for the run's report: asked, and allowed."""
        if not request.keep_as:
            return []
        return [
            detail
            for detail in request.details
            if self.identity.floors is None or self.identity.tells(detail)
        ]

    def most_loss(self, own: bool) -> float:
        """What a single loss on examples counts for at most, in nats; on a deployed node's ``own`` it is bounded."""
        return MOST_LOSS if own and self.identity.floors is not None else math.inf

    def generated(self, rows: int) -> int:
        """Of how many rows of an own test answers are generated: of all, or of so few that none is singled out.

        A run has no say in it: scores of all rows but one beside the loss of all would tell of that one.
        """
        least = (self.identity.floors or Floors()).test_examples
        most = max(MOST_HELD, least)
        return most if rows >= most + least else rows

    def told(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Metrics as they leave: what is measured rounded, counts as they are."""
        if self.identity.floors is None:
            return dict(metrics)
        return {
            name: value if metric_of(name).measure in _EXACT else round(value, _DECIMALS)
            for name, value in metrics.items()
        }

    def _run(self, header: Header, floors: Floors) -> None:
        """Whether this node takes part in a run with these settings and this adapter at all."""
        check_settings(self.config, floors, self.identity.guest)
        check_losses(self.config.train.losses, self.identity.losses)
        check_method(header.method)
        data, labels = self.identity.data, self.config.data.labels
        # Whether an answer is among the labels is a question about the rows.
        for path in filter(None, [data.train, data.test] if labels else []):
            if not self.identity.book.charge(
                self.identity.account(path), LABELS, _digest(labels), floors.tests
            ):
                self._spent("label list", floors.tests, "tests")
        self._disk(floors)

    def _rows(self, rows: int, floors: Floors) -> None:
        least = floors.rows
        if not self.identity.guest and rows < least:
            refuse(
                f"this node has fewer than {least} examples to train on (round-examples and step-examples in its "
                "node.toml): it keeps its bare model"
            )

    def _work(self, request: TrainRequest, rows: int, floors: Floors) -> None:
        """What a training does."""
        train = request.header.train
        for name, (least, most) in _TRAINING.items():
            within(f"train.{name}", getattr(train, name), least, most)
        within("train.local_steps", train.local_steps, 1, floors.local_steps)
        seen = train.local_steps * train.batch_size
        if rows and seen < floors.round_examples:
            refuse(
                f"train.local_steps x train.batch_size is {seen}; this node trains on at least "
                f"{floors.round_examples} different examples a round (round-examples in its node.toml)"
            )

    def _told(self, request: EvaluateRequest, floors: Floors) -> list[str]:
        """Which of the tests asked for are told: public ones, and those of this node's rows that are large enough."""
        own, least, identity = self._own(request.test_sets), floors.test_examples, self.identity
        sizes = dict.fromkeys(request.test_sets, least)
        for scope in own:
            personal = scope == "personal"
            seed = request.header.seed
            sizes[scope] = len(
                identity.examples(seed).personal_test if personal else identity.global_test()
            )
        told = [scope for scope in request.test_sets if sizes[scope] >= least]
        if not told and not request.keep_as:
            refuse(
                f"this node has no test of at least {least} examples (test-examples in its node.toml)"
            )
        return told

    def _own(self, scopes: Sequence[str]) -> list[str]:
        """Those of some tests whose rows are this node's own: its hold-out, and its test file where it has one."""
        public = self.identity.data.test is None
        return [scope for scope in scopes if scope != "global" or not public]

    def _numbers(self, request: TrainRequest | EvaluateRequest) -> None:
        """Start tensors, channels and maps."""
        bounded(request.tensors, "the tensors sent", LARGEST, TYPICAL)
        for name, payload in request.channels.items():
            with naming(f"channel {name}"):
                client_half(name).check(payload)
        if request.maps is not None:
            check_maps(request.maps)
        if request.maps_digest:
            header, book = request.header, self.identity.book
            method = json.dumps(dataclasses.asdict(header.method), sort_keys=True)
            first = header.round <= (1 if isinstance(request, TrainRequest) else 0)
            name = book.keyed(f"maps {header.experiment} {method}")
            if book.pin(name, request.maps_digest, first) != request.maps_digest:
                refuse("the maps are not those that this run began with")

    def _disk(self, floors: Floors) -> None:
        parts = (self.identity.state_dir / part for part in _KEPT)
        if sum(_size(path) for part in parts for path in part.rglob("*")) > floors.state_gb * 1e9:
            refuse(
                f"this node keeps more than {floors.state_gb:g} GB of runs; its owner can remove old ones from its "
                "state-dir, or raise state-gb in its node.toml"
            )

    def _spent(self, kind: str, most: int, key: str) -> None:
        refuse(
            f"this node's budget of {most} {kind}s on its data file is spent; its owner can raise {key} in [floors] of "
            "node.toml"
        )


def _size(path: Path) -> int:
    """Bytes of a file; 0 where it is none, or another process has just replaced it."""
    try:
        found = path.lstat()
    except OSError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


def _digest(value: Any) -> str:
    """SHA-256 (hex) of a request as it acts: what it names instead of carrying is in the start values."""
    text = json.dumps(_plain(value), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        content = np.ascontiguousarray(value).tobytes()
        return [list(value.shape), str(value.dtype), hashlib.sha256(content).hexdigest()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = _NAMED if isinstance(value, TrainRequest | EvaluateRequest) else ()
        names = (item.name for item in dataclasses.fields(value))
        return {name: _plain(getattr(value, name)) for name in names if name not in named}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


#: Parts of a request that other parts stand for, or that a resumed run sends otherwise.
_NAMED = ("maps", "cached", "tensors")
