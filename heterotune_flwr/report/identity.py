"""Which run it is, and how it stands."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from heterotune_flwr.federation.resume import run_state
from heterotune_flwr.jsons import as_list, as_mapping, as_number, as_whole, whole_or_none
from heterotune_flwr.report.facts import Identity, Start, StrategyRun
from heterotune_flwr.report.files import RunFiles, size_of
from heterotune_flwr.reporting.measures import subject_of

#: An absolute path anywhere in a text, and its last part; no address of the web.
_PLACE = re.compile(r"""(?<![\w./:…])~?/(?:[^\s/'"]+/)*([^\s/'",;:)\]]+)/?""")


def identity(files: RunFiles, runs: Sequence[StrategyRun]) -> Identity:
    """Name, state, starts, and what the run is about."""
    section = files.section("run")
    state, reason = state_of(files)
    starts = _starts(files)
    times = [at for event in files.events if (at := as_number(event.get("time"))) is not None]
    strategies = list(dict.fromkeys(run.strategy for run in runs))
    labels = labels_of(files)
    return Identity(
        name=str(section.get("name") or files.name or files.directory.name),
        directory=str(files.directory),
        state=state,
        reason=reason,
        created=times[0] if times else None,
        last_event=times[-1] if times else as_number(files.status.get("time")),
        resumed=sum(start.resumed for start in starts),
        starts=starts,
        versions=_versions(files),
        simulated=was_simulated(files),
        seeds=list(dict.fromkeys(run.seed for run in runs)),
        strategies=strategies,
        subject=subject_of(strategies) if strategies else "",
        rounds=whole_or_none(files.section("server").get("rounds")),
        clients=max([as_whole(e.get("clients")) for e in files.of("describe", "start")], default=0)
        or max((run.population for run in runs), default=0),
        tested=max([as_whole(e.get("tested")) for e in files.of("evaluate")], default=0),
        task=_task(files, labels),
        labels=labels,
        data=_data(files.section("data")),
        notes=[str(line) for event in files.of("data") for line in as_list(event.get("notes"))],
        bytes_on_disk=size_of(files.directory),
    )


def state_of(files: RunFiles) -> tuple[str, str]:
    """How the run stands, and its own word on it."""
    state, reason = run_state(files.directory, files.status, files.events)
    return "running" if state == "starting" else state, reason


def _starts(files: RunFiles) -> list[Start]:
    """One entry for each start; all but the first go on with the run."""
    found: list[Start] = []
    torn = False  # whoever writes first after a crash closes the line, and tells
    for event in files.events:
        torn = torn or event.get("torn_line") is True
        if event["event"] == "journal":
            at, program = as_number(event.get("time")), str(event.get("program") or "")
            found.append(Start(at, bool(found), torn, program))
            torn = False
    return found


def _versions(files: RunFiles) -> dict[str, str]:
    """Programs by name, of the last start that tells of them, and the version of the journal."""
    found: dict[str, str] = {}
    for event in files.of("journal"):
        found |= {str(k): str(v) for k, v in as_mapping(event.get("versions")).items()}
        found["journal"] = str(event.get("version"))
    return found


def was_simulated(files: RunFiles) -> bool | None:
    """Whether all clients were one machine's; None where no start of the run says."""
    told = [e["simulated"] for e in files.of("journal") if isinstance(e.get("simulated"), bool)]
    return told[-1] if told else None


def labels_of(files: RunFiles) -> list[str]:
    """The closed label set in its order; empty where there is none, or nobody said."""
    rows = (as_mapping(r) for run in files.results.values() for r in as_list(run.get("clients")))
    mixes = (list(as_mapping(as_mapping(row.get("details")).get("label_mix"))) for row in rows)
    told = (as_list(event.get("labels")) for event in files.of("describe"))
    given = as_list(files.section("data").get("labels"))
    return [str(label) for label in next(filter(None, (*mixes, *told)), given)]


def _task(files: RunFiles, labels: Sequence[str]) -> str:
    """``text`` where the loss is over all tokens of answers; empty where only the clients know."""
    loss = files.section("train").get("loss")
    if loss == "tokens" or (loss == "auto" and as_whole(files.section("data").get("generate"))):
        return "text"
    if loss == "labels" or labels or as_whole(files.section("data").get("max_labels")):
        return "labels"
    return ""


def on_a_page(text: str) -> str:
    """A text; of places on this machine in it the last part alone, since pages are passed on."""
    return _PLACE.sub(r"…/\1", text)


def _data(data: Mapping[str, Any]) -> str:
    if not data:
        return ""
    train = data.get("train")
    parts = [on_a_page(str(train)) if train else str(data.get("name") or "")]
    if data.get("partition"):
        alpha = (
            f" {data['alpha']:g}"
            if data.get("partition") == "dirichlet" and as_number(data.get("alpha"))
            else ""
        )
        natural = data["partition"] == "natural"
        parts.append("each client's own" if natural else f"divided by {data['partition']}{alpha}")
    if data.get("examples_per_client"):
        parts.append(f"up to {data['examples_per_client']} examples a client")
    return ", ".join(filter(None, parts))
