"""What a client takes home after a run: it trains alone for comparison, chooses, and keeps a record.

See docs/take-home.md. Everything stays in its state-dir (:mod:`..tuning.kept_model`); the server is told which model
was taken, and how each of them did.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from heterotune_flwr.channels.client_half import ClientWork
from heterotune_flwr.client.local_training import RoundLog, alone_training, train_alone
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


@dataclass(frozen=True)
class _Model:
    """A candidate: its adapter's values, what acts beside it, how it did on the tests asked.

    ``chosen_by``: on the choosing set too, where that is known already.
    """

    values: Tensors
    help: Help
    tests: Sequence[Tested]
    chosen_by: ExampleResults | None = None


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
    models, training = _models(client, request, work, federated, log_of)
    took, choosing = _chosen(client, work, models)
    record = _record(client, request, work, models, took, choosing)
    saved = _saved(_folder(client, work), record, log_of, training)
    told = _told(models, [name for name in models if name != FEDERATED])
    tests = {name: model.tests for name, model in models.items()}
    if not saved or not client.guard.tells_choice(choosing.examples):
        return Taken("", told, tests)
    if models[FEDERATED].help != HELPED:  # chosen too
        told |= _told(models, [FEDERATED])
    told["choosing_examples"] = float(choosing.examples)
    for name, measured in choosing.models.items():
        told |= {f"{name}_choosing_loss": measured.loss, f"{name}_choosing_error": measured.error}
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
) -> tuple[dict[str, _Model], str]:
    """What there is to choose from, each tested, the federated one last; and of which training the one alone is."""
    adapter, header = work.adapter, work.header
    reached = adapter.read()
    help, chosen_by = _help(client, work)
    if help != HELPED:
        federated = _tests(client, request, work, help)
    alone, training = None, ""
    if (
        request.tensors or request.channels
    ):  # else nothing came from others: the model is the one trained alone
        alone, training = _alone(client, work, log_of)
    values = {BARE: initial_tensors(adapter.shapes, header.seed), ALONE: alone}
    models = {}
    for name, tensors in values.items():
        if tensors is None:
            continue
        adapter.load(tensors)
        models[name] = _Model(tensors, _HELP[name], _tests(client, request, work, _HELP[name]))
    return models | {FEDERATED: _Model(reached, help, federated, chosen_by)}, training


def _help(client: Client, work: ClientWork) -> tuple[Help, ExampleResults | None]:
    """Choose how much of what channels add acts beside the federated model, which the adapter holds; how it does then.

    How sure of itself a classifier in closed form may be is known from no training: the choosing set tells.
    """
    encoded = client.encoded("choosing", work.header.seed)
    if len(encoded) < FEWEST or work.logits(encoded, "test") is None:
        return HELPED, None
    results = {share: by_example(client, work, "choosing", Help(True, share)) for share in SHARES}
    best = min(SHARES, key=lambda share: np.nan_to_num(results[share].loss, nan=np.inf))
    return Help(True, best), results[best]


def _tests(client: Client, request: EvaluateRequest, work: ClientWork, help: Help) -> list[Tested]:
    """How the adapter does on the tests asked."""
    return [tested(client, work, scope, help) for scope in request.test_sets]


def _alone(client: Client, work: ClientWork, log_of: RoundLog) -> tuple[Tensors | None, str]:
    """The model trained alone: the kept one while it would come out the same, else trained, on the trainings' budget.

    None where there is none, or the budget is spent. With it comes the digest of that training.
    """
    header, adapter = work.header, work.adapter
    rounds = log_of.read()
    if adapter.kind != "dema" or not rounds or not len(client.encoded("train", header.seed)):
        return None, ""
    training, kept = alone_training(client, header, adapter, rounds), _kept_alone(client, work)
    if log_of.is_kept(training, kept):
        return kept, training
    if not client.guard.charge_alone(len(rounds)):
        log.warning("the budget of trainings on the data file is spent: no model is trained alone")
        return None, ""
    return train_alone(client, header, adapter, rounds), training


def _kept_alone(client: Client, work: ClientWork) -> Tensors | None:
    try:
        return KeptModel.load(_folder(client, work)).alone
    except ExchangeError:
        return None


def _folder(client: Client, work: ClientWork) -> Path:
    return kept_folder(client.identity.state_dir, work.header.experiment, client.client_id)


def _saved(folder: Path, record: KeptModel, log_of: RoundLog, training: str) -> bool:
    """Keep the record; False where the disk does not take it, which must not cost the test."""
    try:
        record.save(folder)
        if record.alone is not None:
            log_of.keep_alone(training, record.alone)
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
    models: dict[str, _Model],
    took: str,
    choosing: Choosing,
) -> KeptModel:
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
        federated=models[FEDERATED].values,
        alone=None if alone is None else alone.values,
        head=_scaled(work.head(), models[FEDERATED].help.channels),
    )


def _scaled(head: Head | None, share: float) -> Head | None:
    """A share of a head; none of it is no head."""
    if head is None or not share:
        return None
    return Head(np.float32(share) * head.weight, np.float32(share) * head.bias)
