"""Benchmarks of EleutherAI's lm-eval on an exported model: untouched, alone and federated beside each other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from heterotune_flwr.errors import ConfigError, DataError, HeteroTuneError
from heterotune_flwr.export.model import Model
from heterotune_flwr.fields import nearest

#: Task -> model -> metric -> value.
TaskScores = dict[str, dict[str, dict[str, float]]]
#: Of lm-eval's numbers these are no metrics.
_NO_METRICS = ("_stderr", "sample_len", "sample_count")


def check_installed() -> None:
    """Refuse before any work where lm-eval is not there (ConfigError)."""
    if find_spec("lm_eval") is None:
        raise ConfigError(
            "--tasks needs lm-eval, which is not installed; get it with: pip install 'heterotune-flwr[eval]'"
        )


def find_tasks(names: Sequence[str]) -> Any:
    """lm-eval's task manager that knows all of ``names``, and these as it calls them.

    Parameters
    ----------
    names
        Tasks or groups of lm-eval, or paths of YAML files with tasks of one's own.

    Raises
    ------
    ConfigError
        lm-eval is not installed, or knows no such task.
    DataError
        A YAML file is not there, or describes no task.

    """
    check_installed()
    from lm_eval.tasks import TaskManager

    files = [Path(name).expanduser() for name in names if _is_file(name)]
    own = {str(path): _task_name(path) for path in files}
    called = [own.get(str(Path(name).expanduser()), name) for name in names]
    manager = TaskManager(
        include_path=sorted({str(path.parent.absolute()) for path in files}) or None,
        include_defaults=len(own) < len(names),
    )
    for name in called:
        if not manager.match_tasks([name]):
            raise ConfigError(
                f"lm-eval has no task {name!r}{nearest(name, manager.all_tasks)} "
                "(lm-eval ls tasks lists them; or give the path of a task's YAML)"
            )
    return manager, called


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _task_name(path: Path) -> str:
    """What a task's YAML calls it; values that only lm-eval can read are passed over."""
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
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
    names: Sequence[str],
    using: Sequence[str],
    *,
    limit: int | None = None,
    shots: int | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> TaskScores:
    """Scores of some of a model's models on tasks.

    Parameters
    ----------
    model, using
        The exported model, and which of its models.
    names
        As :func:`find_tasks`.
    limit
        Only so many questions of each task; None: all.
    shots
        Examples in every question; None: as the task says.
    note
        Takes a line for every model that begins.

    Raises
    ------
    ConfigError
        As :func:`find_tasks`.
    DataError
        The data of a task cannot be had.

    """
    manager, called = find_tasks(names)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    for chatty in ("lm_eval", "huggingface_hub"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    scores: TaskScores = {}
    for name in using:
        note(f"{name}: {', '.join(called)}")
        with model.acting(name):
            subject = HFLM(
                pretrained=model.model,
                tokenizer=model.tokenizer,
                max_length=model.context,
                batch_size=8,
            )
            try:
                found = simple_evaluate(
                    subject,
                    tasks=list(called),
                    num_fewshot=shots,
                    limit=limit,
                    task_manager=manager,
                    log_samples=False,
                    bootstrap_iters=0,
                )
            except HeteroTuneError:
                raise
            except Exception as error:
                raise _refused(called, error) from error
        for task, values in (found or {})["results"].items():
            scores.setdefault(task, {})[name] = _metrics(values)
    return scores


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """``acc`` of ``acc,none``; a filter's name stays where there is one."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and not any(part in key for part in _NO_METRICS)
    }


def _refused(names: Sequence[str], error: Exception) -> DataError:
    which, reason = ", ".join(names), " ".join(str(error).split())[:200]
    if isinstance(error, ConnectionError):
        return DataError(
            f"the data of {which} come from the Hugging Face hub, which cannot be reached from here ({reason}); run it "
            "once where it can be, and copy ~/.cache/huggingface, or give the YAML of a task whose data are files"
        )
    return DataError(f"{which} cannot be run ({type(error).__name__}: {reason})")
