"""What a client takes home after a run: it trains alone for comparison, goes on by itself, chooses, keeps a record.

See docs/take-home.md. Everything stays in its state-dir (:mod:`..tuning.kept_model`); the server is told which model
was taken, and how each of them did.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from heterotune_flwr.channels.client_half import ClientWork
from heterotune_flwr.client.local_training import (
    RoundLog,
    alone_training,
    own_rounds,
    own_training,
    train_alone,
)
from heterotune_flwr.client.node import Client
from heterotune_flwr.client.testing import HELPED, Help, Tested, by_example, merged, tested
from heterotune_flwr.dema.bank import initial_tensors
from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.exchange.packing import Tensors
from heterotune_flwr.protocol.messages import EvaluateRequest
from heterotune_flwr.protocol.metrics import ALONE, BARE, FEDERATED
from heterotune_flwr.tuning.choice import FEWEST, Scores, choose, without_choice
from heterotune_flwr.tuning.evaluate import ExampleResults
from heterotune_flwr.tuning.generation import rouge_by_example
from heterotune_flwr.tuning.kept_model import (
    Choosing,
    Head,
    KeptBackbone,
    KeptForm,
    KeptModel,
    kept_folder,
)

log = logging.getLogger(__name__)

#: What acts in a test of the models that have nothing from others.
_HELP = {BARE: Help(False, 0.0), ALONE: Help(True, 0.0)}
#: How much of what channels add to the labels' logits a client may take home.
SHARES = (1.0, 0.5, 0.25, 0.0)
#: How many rounds on own examples alone the federated model may have had at most when a client takes it home.
OWN_ROUNDS = 2


@dataclass(frozen=True)
class _Model:
    """A candidate: its adapter's values, what acts beside it, how it did on the tests asked.

    ``chosen_by``: on the choosing set too, where that is known already. ``own_rounds``: after the run's.
    """

    values: Tensors
    help: Help
    tests: Sequence[Tested]
    chosen_by: ExampleResults | None = None
    own_rounds: int = 0


@dataclass
class _Found:
    """What there is to choose from, by name, the federated one last.

    ``shared`` are that one's values before own rounds, ``shared_tests`` what they did. ``trainings``: of which training
    a model is (:mod:`.local_training`), where that is to be remembered.
    """

    shared: Tensors
    shared_tests: Sequence[Tested]
    models: dict[str, _Model] = field(default_factory=dict)
    trainings: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Taken:
    """What came of the choice.

    Attributes
    ----------
    took
        The model taken; empty where the node's floors do not let that be told, or it could not be kept.
    metrics
        What is told besides the federated model's tests.
    tests
        Every model's tests, by its name.

    """

    took: str
    metrics: dict[str, float]
    tests: Mapping[str, Sequence[Tested]]


def take_home(
    client: Client, request: EvaluateRequest, work: ClientWork, federated: Sequence[Tested]
) -> Taken:
    """Choose and keep a model; the adapter holds the federated one, which did ``federated`` on the tests asked.

    It holds any of the models afterwards.
    """
    log_of = RoundLog(work.store, work.header, request.maps_digest)
    found = _models(client, request, work, federated, log_of)
    models = found.models
    took, choosing = _chosen(client, work, models)
    record = _record(client, request, work, found, took, choosing)
    saved = _saved(_folder(client, work), record, log_of, found.trainings)
    told = _told(models, [name for name in models if name != FEDERATED])
    tests = {name: model.tests for name, model in models.items()}
    if not saved or not client.guard.tells_choice(choosing.examples):
        return Taken("", told, tests)
    if models[FEDERATED].tests is not federated:  # chosen too
        told |= _told(models, [FEDERATED])
    told["choosing_examples"] = float(choosing.examples)
    for name, measured in choosing.models.items():
        told |= {f"{name}_choosing_loss": measured.loss, f"{name}_choosing_error": measured.error}
    if record.own_rounds:
        told[f"{FEDERATED}_choosing_own_rounds"] = float(record.own_rounds)
    return Taken(took, told, tests)


def _told(models: Mapping[str, _Model], names: Sequence[str]) -> dict[str, float]:
    """Tests of some models as they travel: ``bare_personal_loss``, ..."""
    return {
        f"{name}_{key}": value
        for name in names
        for key, value in merged(models[name].tests).items()
    }


def _models(
    client: Client,
    request: EvaluateRequest,
    work: ClientWork,
    federated: Sequence[Tested],
    log_of: RoundLog,
) -> _Found:
    """What there is to choose from, each tested."""
    adapter, header = work.adapter, work.header
    found = _Found(adapter.read(), federated)
    others = request.tensors or request.channels  # else the model is the one trained alone
    alone = _alone(client, work, log_of, found) if others else None
    values = {BARE: initial_tensors(adapter.shapes, header.seed), ALONE: alone}
    for name, tensors in values.items():
        if tensors is None:
            continue
        adapter.load(tensors)
        tests = _tests(client, request, work, _HELP[name])
        found.models[name] = _Model(tensors, _HELP[name], tests)
    found.models[FEDERATED] = _federated(client, request, work, log_of, found)
    return found


def _federated(
    client: Client, request: EvaluateRequest, work: ClientWork, log_of: RoundLog, found: _Found
) -> _Model:
    """The federated model after as many own rounds, and with as much of what channels add, as fits the choosing set.

    How sure of itself a classifier in closed form may be is known from no training, nor how far a client is from the
    others: the choosing set tells. Of equals the fewest rounds, then the largest share.
    """
    encoded = client.encoded("choosing", work.header.seed)
    work.adapter.load(found.shared)
    if len(encoded) < FEWEST:
        return _Model(found.shared, HELPED, found.shared_tests)
    shares = SHARES[:1] if work.logits(encoded, "test") is None else SHARES
    looks = [
        (by_example(client, work, "choosing", Help(True, share)), rounds, values, share)
        for rounds, values in _after_own_rounds(client, work, log_of, found)
        for share in shares
    ]
    results, rounds, values, share = min(
        looks, key=lambda look: np.nan_to_num(look[0].loss, nan=np.inf)
    )
    help, tests = Help(True, share), found.shared_tests
    if rounds or help != HELPED:
        work.adapter.load(values)
        tests = _tests(client, request, work, help)
    return _Model(values, help, tests, results, rounds)


def _after_own_rounds(
    client: Client, work: ClientWork, log_of: RoundLog, found: _Found
) -> Iterable[tuple[int, Tensors]]:
    """The federated model, which the adapter holds, after 0, 1, ... own rounds; the adapter goes with it.

    The kept one alone where it would come out the same; as the run left it where there is no model alone, or the budget
    of trainings is spent.
    """
    if ALONE not in found.models:
        return [(0, found.shared)]
    asked = work.each(lambda half: half.asked.digest)
    training, kept = own_training(found.trainings[ALONE], found.shared, asked), _kept(client, work)
    if kept is not None and log_of.is_kept(FEDERATED, training, kept.federated):
        found.trainings[FEDERATED] = training
        work.adapter.load(kept.federated)
        return [(kept.own_rounds, kept.federated)]
    if not client.guard.charge_alone(OWN_ROUNDS):
        log.warning("the budget of trainings on the data file is spent: no own rounds")
        return [(0, found.shared)]
    found.trainings[FEDERATED] = training
    last = log_of.read()[-1]
    return enumerate(own_rounds(client, work.header, work.adapter, last, OWN_ROUNDS))


def _tests(client: Client, request: EvaluateRequest, work: ClientWork, help: Help) -> list[Tested]:
    """How the adapter does on the tests asked."""
    return [tested(client, work, scope, help) for scope in request.test_sets]


def _alone(client: Client, work: ClientWork, log_of: RoundLog, found: _Found) -> Tensors | None:
    """The model trained alone: the kept one while it would come out the same, else trained, on the trainings' budget.

    None where there is none, or the budget is spent. Which training it is of is noted.
    """
    header, adapter = work.header, work.adapter
    rounds = log_of.read()
    if adapter.kind != "dema" or not rounds or not len(client.encoded("train", header.seed)):
        return None
    training, kept = alone_training(client, header, adapter, rounds), _kept(client, work)
    if kept is not None and log_of.is_kept(ALONE, training, kept.alone):
        found.trainings[ALONE] = training
        return kept.alone
    if not client.guard.charge_alone(len(rounds)):
        log.warning("the budget of trainings on the data file is spent: no model is trained alone")
        return None
    found.trainings[ALONE] = training
    return train_alone(client, header, adapter, rounds)


def _kept(client: Client, work: ClientWork) -> KeptModel | None:
    """What an earlier last test of this run kept."""
    try:
        return KeptModel.load(_folder(client, work))
    except ExchangeError:
        return None


def _folder(client: Client, work: ClientWork) -> Path:
    return kept_folder(client.identity.state_dir, work.header.experiment, client.client_id)


def _saved(folder: Path, record: KeptModel, log_of: RoundLog, trainings: Mapping[str, str]) -> bool:
    """Keep the record; False where the disk does not take it, which must not cost the test."""
    try:
        record.save(folder)
        for name, tensors in ((ALONE, record.alone), (FEDERATED, record.federated)):
            if tensors is not None and name in trainings:
                log_of.keep(name, trainings[name], tensors)
    except OSError as error:
        log.error("what this client takes home cannot be kept: %s", error)
        return False
    return True


def _chosen(client: Client, work: ClientWork, models: dict[str, _Model]) -> tuple[str, Choosing]:
    """Decide by the choosing set."""
    adapter, task, seed = work.adapter, work.task, work.header.seed
    size = len(client.encoded("choosing", seed))
    if size < FEWEST:
        return without_choice(size)
    results = {}
    for name, model in models.items():
        if model.chosen_by is None:
            adapter.load(model.values)
            results[name] = by_example(client, work, "choosing", model.help)
        else:
            results[name] = model.chosen_by

    def score(name: str) -> Scores | None:
        if task.kind == "labels":
            return results[name].right.astype(np.float64)
        if not client.identity.data.generate:
            return None
        adapter.load(models[name].values)
        return rouge_by_example(adapter, task, *client.asked("choosing", seed))

    return choose(results, score)


def _record(
    client: Client,
    request: EvaluateRequest,
    work: ClientWork,
    found: _Found,
    took: str,
    choosing: Choosing,
) -> KeptModel:
    models, federated = found.models, found.models[FEDERATED]
    header, task, data, own = work.header, work.task, client.identity.data, client.data
    spec, prior, examples = client.backbone.spec, client.prior(header.seed), own(header.seed)
    alone = models.get(ALONE)
    return KeptModel(
        experiment=header.experiment,
        strategy=request.keep_as,
        seed=header.seed,
        rounds=header.round,
        client_id=client.client_id,
        type_key=client.type_key,
        backbone=KeptBackbone(
            spec.source,
            spec.bits,
            spec.revision,
            client.backbone.fingerprint,
            str(client.backbone.model.dtype).removeprefix("torch."),
        ),
        method=work.adapter.method,
        labels=None if task.labels is None else list(task.labels),
        loss=task.kind,
        form=KeptForm(
            data.prompt,
            task.form.kind,
            data.system,
            data.max_length,
            data.max_answer_tokens,
            task.form.stop,
            any(example.turns for example in (*examples.train, *examples.choosing)),
        ),
        maps_digest=request.maps_digest,
        took=took,
        choosing=choosing,
        tests={name: merged(model.tests) for name, model in models.items()},
        examples={
            "train": len(examples.train),
            "choosing": len(examples.choosing),
            "personal": len(examples.personal_test),
        },
        prior=None if prior is None else prior.tolist(),
        own_rounds=federated.own_rounds,
        shared_tests=merged(found.shared_tests) if federated.own_rounds else {},
        federated=federated.values,
        shared=found.shared if federated.own_rounds else None,
        alone=None if alone is None else alone.values,
        head=_scaled(work.head(), federated.help.channels),
    )


def _scaled(head: Head | None, share: float) -> Head | None:
    """A share of a head; none of it is no head."""
    if head is None or not share:
        return None
    return Head(np.float32(share) * head.weight, np.float32(share) * head.bias)
