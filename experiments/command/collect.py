"""Which runs in the store are those of an experiment preset."""

import functools
import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import OmegaConf, open_dict, read_write

from diffusion.source_code import code_of
from experiments import CONFIG_FOLDER
from experiments.command.arguments import is_sweep, tidy_arguments
from experiments.command.composing import plain_job, sweep_jobs
from experiments.command.config import PROMPT_SETS
from experiments.command.errors import CommandError
from experiments.command.shorthands import spell_out
from experiments.fit import fitted
from experiments.job.remote import place_of
from experiments.job.remote_store import local_copy
from experiments.job.settings import matters
from experiments.job.summary import read_summaries
from experiments.results.names import GROUPS

log = logging.getLogger(__name__)

CODED_GROUPS = ("eraser", "pruning", "attack", "judge")
"""Groups whose class's code is part of a run's identity."""

_NOT_NUMBERS = {"store", "tracker", "fresh", "dry_run", "floor", "taken", "transfer"}


def experiment_jobs(experiment: str, overrides: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The composed configs of every job of an experiment preset, as plain data."""
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        told = spell_out([f"+experiment={experiment}", *tidy_arguments(overrides)])
        alone = [override for override in told if not is_sweep(override)]
        sweep = compose("config", alone, return_hydra_config=True)
        with open_dict(sweep), read_write(sweep):
            sweep.hydra.overrides.task = told
        jobs = [plain_job(job)[0] for job in sweep_jobs(sweep, "config")]
        return [fitted(job) for job in jobs]


def as_composed_now(config: Mapping[str, Any]) -> dict[str, Any]:
    """A job's plain config with the fields that older jobs lack, which say what those jobs did."""
    if config.keys() >= {*PROMPT_SETS, "protocol", "retained_sampling"}:
        return dict(config)
    own = {key: OmegaConf.load(CONFIG_FOLDER / key / "own.yaml") for key in PROMPT_SETS}
    added = {**own, **OmegaConf.load(CONFIG_FOLDER / "protocol" / "none.yaml"), "retained_sampling": None}
    completed = OmegaConf.create({**added, **config, "model": {"resolution": None, **config["model"]}})
    return OmegaConf.to_container(completed, resolve=True)  # type: ignore[return-value]


@dataclass(frozen=True)
class StoredRun:
    """A run, and what one is found by.

    Attributes:
        summary: Its summary, with the config as it would be composed now.
        numbers: The part of that config that its numbers follow from.
    """

    summary: dict[str, Any]
    numbers: Any

    @classmethod
    def of(cls, summary: Mapping[str, Any]) -> "StoredRun":
        """A run by the summary that it left."""
        config = as_composed_now(summary["config"])
        return cls({**summary, "config": config}, _numbers_config(config))


def read_runs(store: str) -> list[StoredRun]:
    """The runs in a store, told as a command tells it, the newest first."""
    return [StoredRun.of(summary) for summary in read_summaries(local_copy(place_of(store)))]


def find_run(job: Mapping[str, Any], runs: Sequence[StoredRun]) -> dict[str, Any] | None:
    """The summary of the first of the runs with the config of ``job``."""
    wanted = _numbers_config(as_composed_now(job))
    return next((run.summary for run in runs if run.numbers == wanted), None)


def made_by_other_code(summary: Mapping[str, Any]) -> list[str]:
    """Which parts of a run have other code by now, so that the same command would be worked on anew."""
    changed = []
    for group in CODED_GROUPS:
        told = summary.get("identity", {}).get(group, {}).get("code")
        if told is None:
            continue
        try:
            found = get_object(summary["config"][group]["_target_"])
        except ImportError:
            changed.append(group)
        else:
            if isinstance(found, type) and told != code_of(found):
                changed.append(group)
    return changed


def collect_runs(experiment: str, overrides: Sequence[str] = ()) -> tuple[list[dict[str, Any]], list[str]]:
    """The summaries of an experiment's jobs, in their order, and the names of the jobs that were not run yet.

    Raises:
        CommandError: None was run.
    """
    jobs = experiment_jobs(experiment, overrides)
    stored = read_runs(jobs[0]["store"])
    runs = [find_run(job, stored) for job in jobs]
    found = [run for run in runs if run is not None]
    if not found:
        raise CommandError(
            f"The store {jobs[0]['store']} has no run of {experiment}; make them with "
            f"`python run.py -m +experiment={experiment}`."
        )
    changed = [run["run"] for run in found if made_by_other_code(run)]
    if changed:
        log.warning(
            "%d runs were made by other code than this: %s; run their commands again for the numbers of this code",
            *(len(changed), ", ".join(changed)),
        )
    return found, [_job_name(job) for job, run in zip(jobs, runs, strict=True) if run is None]


def _job_name(job: Mapping[str, Any]) -> str:
    classes = [f"{group} {job[group]['_target_'].rpartition('.')[2]}" for group in GROUPS]
    return ", ".join([str(job["concept"]["name"]), *classes])


def _numbers_config(config: Mapping[str, Any]) -> Any:
    return _without_defaults(matters({key: value for key, value in config.items() if key not in _NOT_NUMBERS}))


def _without_defaults(config: Any) -> Any:
    """``config`` without what each class in it takes anyway: runs of before a class had a field do not name it."""
    if isinstance(config, list):
        return [_without_defaults(value) for value in config]
    if not isinstance(config, dict):
        return config
    defaults = _defaults(str(config["_target_"])) if config.get("_target_") else {}
    return {
        key: _without_defaults(value) for key, value in config.items() if key not in defaults or defaults[key] != value
    }


@functools.cache
def _defaults(target: str) -> Mapping[str, Any]:
    """What the class or function called ``target`` takes where it is told nothing, as a config would say it."""
    try:
        parameters = inspect.signature(get_object(target)).parameters
    except (ImportError, TypeError, ValueError):
        return {}
    return {
        name: list(each.default) if isinstance(each.default, tuple) else each.default
        for name, each in parameters.items()
        if each.default is not each.empty
    }
