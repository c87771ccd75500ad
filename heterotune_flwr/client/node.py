"""A node at work on one message: who it is, its backbone, its data, and the adapter that the message asks for.

Virtual clients of a simulation share worker processes. What is kept between messages here is
frozen or derived from public settings only: backbones, token ids, states.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from heterotune_flwr.alignment.maps import resolve_output
from heterotune_flwr.alignment.views import views_of
from heterotune_flwr.backbones.loading import Backbone, load_backbone
from heterotune_flwr.channels.channel import client_half
from heterotune_flwr.channels.client_half import ClientWork
from heterotune_flwr.client.encodings import encodings
from heterotune_flwr.client.guard import Guard
from heterotune_flwr.client.identify import identify, is_simulated
from heterotune_flwr.client.identity import Identity
from heterotune_flwr.config.choices import check_choices
from heterotune_flwr.config.compose import compose
from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.partition import ClientData
from heterotune_flwr.data.sources import examples_digest, label_set
from heterotune_flwr.errors import naming
from heterotune_flwr.exchange.storage import close_to_others, private_folder
from heterotune_flwr.flower import Context
from heterotune_flwr.protocol.messages import Header
from heterotune_flwr.protocol.payloads import Payload
from heterotune_flwr.schema import Config, DataConfig, MethodConfig
from heterotune_flwr.tuning.adapters import AttachedAdapter, attach
from heterotune_flwr.tuning.client_state import ClientStore
from heterotune_flwr.tuning.evaluate import measured_once
from heterotune_flwr.tuning.generation import GenerationReport, score_generation
from heterotune_flwr.tuning.slots import lowest_slot
from heterotune_flwr.tuning.state_cache import keep_in
from heterotune_flwr.tuning.task import EncodedSet, Task


@functools.lru_cache(maxsize=16)
def _composed(config: str, overrides: str, trusted: bool) -> Config:
    return compose(config, overrides, trusted)


@dataclass(frozen=True)
class Client:
    """A client answering one message: its identity, the run, and its loaded backbone."""

    identity: Identity
    config: Config
    backbone: Backbone

    @classmethod
    def of(cls, context: Context) -> Client:
        """Return the client of a Flower context; loads its backbone once per process."""
        run_config = context.run_config
        config = _composed(
            str(run_config.get("config", "demo")),
            str(run_config.get("overrides", "")),
            is_simulated(context.node_config),
        )
        identity = identify(config, context.node_config, context.run_id)
        deployed = identity.partition is None
        if deployed:
            private_folder(identity.state_dir)
            close_to_others(identity.state_dir)
        keep_in(identity.state_dir if deployed else None)
        torch.set_num_threads(max(1, identity.threads))
        return cls(identity, config, load_backbone(identity.spec))

    @property
    def client_id(self) -> str:
        """Stable id."""
        return self.identity.client_id

    @property
    def type_key(self) -> str:
        """Model type."""
        return self.backbone.type_key

    @property
    def guard(self) -> Guard:
        """What this client's owner lets a run ask of it."""
        return Guard(self.identity, self.config)

    def data(self, seed: int) -> ClientData:
        """Own examples."""
        return self.identity.examples(seed)

    def by(self, header: Header) -> Client:
        """The same client, working by a message's training settings."""
        config = replace(self.config, train=header.train)
        check_choices(replace(config, method=header.method))  # they came with the message
        views_of(header.method)
        return replace(self, config=config)

    def task(self) -> Task:
        """Loss of this run on this backbone."""
        return encodings.task(self.backbone, self.identity, self.config)

    def encoded(self, part: str, seed: int) -> EncodedSet:
        """Token ids of ``train``, ``personal``, ``choosing`` or ``global`` examples."""
        task = self.task()
        if part == "global":
            own = self.identity.data.test
            stamp = self.identity.stamp(own) if own else ""
            return encodings.encoded(task, ("global", stamp), self.identity.global_test)
        key = (part, *self.identity.examples_key(seed))
        return encodings.encoded(task, key, lambda: self.examples(part, seed), part == "train")

    def examples(self, part: str, seed: int) -> list[Example]:
        """Examples of ``train``, ``personal``, ``choosing`` or ``global``."""
        if part == "global":
            return self.identity.global_test()
        data = self.data(seed)
        return {"train": data.train, "personal": data.personal_test}.get(part, data.choosing)

    def generation(self, adapter: AttachedAdapter, scope: str, seed: int) -> GenerationReport:
        """Scores of the answers the adapter generates on the ``personal``, ``choosing`` or ``global`` examples."""
        task, (examples, data) = self.task(), self.asked(scope, seed)
        if scope != "global":
            return score_generation(adapter, task, examples, data)
        form = (data.prompt, data.template, data.system, data.max_length, data.stop)
        settings = (data.generate, data.max_answer_tokens, form)
        key = f"generation {examples_digest(examples[: data.generate])} {settings}"
        return measured_once(adapter, key, lambda: score_generation(adapter, task, examples, data))

    def asked(self, scope: str, seed: int) -> tuple[list[Example], DataConfig]:
        """Examples whose answers may be generated, and data settings that say of how many they are."""
        data, examples = self.identity.data, self.examples(scope, seed)
        if self.guard.own_test(scope):
            data = replace(data, generate=self.guard.generated(len(examples)))
        return examples, data

    def reported(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """What of some metrics leaves."""
        return self.guard.told(self.identity.reported(metrics))

    def prior(self, seed: int) -> Tensor | None:
        """Log label frequencies of the training examples; they never leave the client. None where it has none."""
        encoded = self.encoded("train", seed)
        return self.task().log_prior(encoded, self.config.train) if len(encoded) else None

    def adapter(self, method: MethodConfig, frozen: Sequence[str] = ()) -> AttachedAdapter:
        """Return the adapter of a method on this backbone, values undefined; ``frozen`` names stay fixed."""
        resolved = resolve_output(method, self.config.alignment, label_set(self.identity.data))
        adapter = attach(self.backbone, resolved, resolved.output or resolved.latent)
        slots = self.identity.slots or self.config.train.slots
        adapter.train_from(lowest_slot(slots, resolved.slots), frozen)
        return adapter

    def work(
        self,
        header: Header,
        adapter: AttachedAdapter,
        store: ClientStore,
        own: EncodedSet,
        asked: Mapping[str, Payload],
    ) -> ClientWork:
        """What the channels of a message take part in, and the channels themselves."""
        task = adapter.reads(self.task())
        work = ClientWork(
            self.identity, self.config, header, task, adapter, store, own, encodings.encoded
        )
        halves = {}
        for name, payload in asked.items():
            with naming(f"channel {name}"):
                halves[name] = client_half(name)(payload, work)
        work.channels = halves
        return work

    def store(self, header: Header) -> ClientStore:
        """Return the client's files for an experiment."""
        return ClientStore(self.identity.state_dir, header.experiment, self.client_id)
