"""Tasks and token ids that a client process has made before, by what they were made from."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from heterotune_flwr.backbones.loading import Backbone
from heterotune_flwr.client.identity import Identity
from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.sources import label_set
from heterotune_flwr.schema import Config
from heterotune_flwr.tuning.task import EncodedSet, Task, make_task

_ENCODED_SETS = 4096


class Encodings:
    """Token ids by what they were made from; explicit per-process cache of frozen things."""

    def __init__(self) -> None:
        self._tasks: dict[tuple[str, ...], Task] = {}
        self._sets: OrderedDict[tuple[str, ...], EncodedSet] = OrderedDict()

    def task(self, backbone: Backbone, identity: Identity, config: Config) -> Task:
        """Task of a run on a backbone."""
        labels = label_set(identity.data)
        key = (
            str(id(backbone)),  # a task keeps its backbone alive, so the id cannot be reused
            repr(identity.data),
            repr(labels),
            config.train.loss,
        )
        if key not in self._tasks:
            self._tasks[key] = make_task(backbone, identity.data, labels, config.train)
        return self._tasks[key]

    def encoded(
        self,
        task: Task,
        key: tuple[str, ...],
        examples: Callable[[], list[Example]],
        every_reply: bool = False,
    ) -> EncodedSet:
        """Token ids of the examples that ``key`` identifies; ``every_reply`` as in :meth:`.Task.encode`."""
        full = (str(id(task)), *key)
        if full not in self._sets:
            self._sets[full] = task.encode(examples(), every_reply)
            while len(self._sets) > _ENCODED_SETS:
                self._sets.popitem(last=False)
        self._sets.move_to_end(full)
        return self._sets[full]


#: This process's.
encodings = Encodings()
