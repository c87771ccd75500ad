"""Benchmarks of EleutherAI's lm-eval on an exported model: untouched, alone and federated beside each other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from heterotune_flwr.errors import ConfigError, DataError, one_line
from heterotune_flwr.export.model import Model
from heterotune_flwr.fields import nearest

#: Task -> model -> metric -> value.
TaskScores = dict[str, dict[str, dict[str, float]]]
#: Questions that are read at a time.
_BATCH = 8
#: Of lm-eval's numbers these are no metrics.
_NO_METRICS = ("_stderr", "sample_len", "sample_count")


def check_installed() -> None:
    """Refuse before any work where lm-eval is not there (ConfigError)."""
    if find_spec("lm_eval") is None:
        raise ConfigError(
            "--tasks needs lm-eval, which is not installed; get it with: pip install 'heterotune-flwr[eval]'"
        )


@dataclass(frozen=True)
class Tasks:
    """Tasks that are there: their names, and lm-eval's manager that knows them."""

    names: list[str]
    manager: Any


def find_tasks(wanted: Sequence[str]) -> Tasks:
    """Look for tasks before any work.

    Parameters
    ----------
    wanted
        Tasks or groups of lm-eval, or paths of YAML files with tasks of one's own.

    Raises
    ------
    ConfigError
        lm-eval is not installed, knows no such task, or none is wanted.
    DataError
        A YAML file is not there, or describes no task.

    """
    check_installed()
    if not wanted:
        raise ConfigError("--tasks names no task; give some like hellaswag,arc_easy")
    from lm_eval.tasks import TaskManager

    _quieten()
    files = {name: Path(name).expanduser() for name in wanted if name.endswith((".yaml", ".yml"))}
    names = [_task_name(files[name]) if name in files else name for name in wanted]
    manager = TaskManager(
        include_path=sorted({str(path.parent.absolute()) for path in files.values()}) or None,
        include_defaults=len(files) < len(wanted),
    )
    for name in names:
        if not manager.match_tasks([name]):
            raise ConfigError(
                f"lm-eval has no task {name!r}{nearest(name, manager.all_tasks)} "
                "(lm-eval ls tasks lists them; or give the path of a task's YAML)"
            )
    return Tasks(names, manager)


def _task_name(path: Path) -> str:
    """What a task's YAML calls it; values that only lm-eval can read are passed over."""
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = one_line(error)
        raise DataError(f"the task file {path} cannot be read: {reason}") from error
    name = found.get("task") if isinstance(found, dict) else None
    if not isinstance(name, str):
        raise DataError(f"{path} describes no task of lm-eval: it has no name under 'task'")
    return name


class _Loader(yaml.SafeLoader):
    """YAML whose tags (``!function``) are passed over."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


def run_tasks(
    model: Model,
    tasks: Tasks,
    *,
    limit: int | None = None,
    shots: int | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> TaskScores:
    """Scores of all models of an exported one; in its chat template, with its system prompt, where it was trained so.

    Parameters
    ----------
    model, tasks
        The exported model, and what :func:`find_tasks` found.
    limit
        Only so many questions of each task; None: all.
    shots
        Examples in every question; None: as the task says.
    note
        Takes a line for every model that begins.

    Raises
    ------
    DataError
        A task cannot be run; most often its data cannot be had.

    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    scores: TaskScores = {}
    system = model.facts.record.form.system if model.in_template else None
    for name in model.names:
        form = ", in its chat template" if model.in_template else ""
        note(f"{name}: {', '.join(tasks.names)}{form}")
        with model.acting(name):
            subject = HFLM(
                pretrained=model.model,
                tokenizer=model.tokenizer,
                max_length=model.context,
                batch_size=_BATCH,
            )
            try:
                found = simple_evaluate(
                    subject,
                    tasks=list(tasks.names),
                    num_fewshot=shots,
                    limit=limit,
                    task_manager=tasks.manager,
                    apply_chat_template=model.in_template,
                    fewshot_as_multiturn=model.in_template,
                    system_instruction=system,
                    log_samples=False,
                    bootstrap_iters=0,
                )
            except Exception as error:  # a task's code and data raise whatever they like
                raise _refused(tasks.names, error) from error
        for task, values in (found or {})["results"].items():
            scores.setdefault(task, {})[name] = _metrics(values)
    return scores


def render(scores: TaskScores) -> str:
    """A row for every metric of every task, a column for every model."""
    models = list(dict.fromkeys(name for found in scores.values() for name in found))
    rows = {
        f"{task}, {metric}": [found[name].get(metric) for name in models]
        for task, found in scores.items()
        for metric in next(iter(found.values()), {})
    }
    width = max([len("task, metric"), *map(len, rows)]) + 2
    lines = ["task, metric".ljust(width) + "".join(name.rjust(11) for name in models)]
    for title, values in rows.items():
        cells = ["-" if value is None else f"{value:.4f}" for value in values]
        lines.append(title.ljust(width) + "".join(cell.rjust(11) for cell in cells))
    return "\n".join(lines)


def _quieten() -> None:
    """Leave lm-eval's progress bars, and take its notes away."""
    for chatty in ("lm_eval", "huggingface_hub"):
        logging.getLogger(chatty).setLevel(logging.ERROR)


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """``acc`` of ``acc,none``; a filter's name stays where there is one."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and not any(part in key for part in _NO_METRICS)
    }


def _refused(names: Sequence[str], error: Exception) -> DataError:
    which, reason = ", ".join(names), one_line(error)
    if isinstance(error, ConnectionError):
        return DataError(
            f"the data of {which} come from the Hugging Face hub, which cannot be reached from here ({reason}); run it "
            "once where it can be, and copy ~/.cache/huggingface, or give the YAML of a task whose data are files"
        )
    return DataError(f"{which} cannot be run ({type(error).__name__}: {reason})")
