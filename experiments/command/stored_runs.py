"""Runs of the store by their names, and what they were made of."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments.command.collect import as_composed_now
from experiments.command.config import build, make_object
from experiments.command.errors import CommandError
from experiments.job.settings import Job
from experiments.job.summary import read_summaries


def run_named(name: str, store: Path) -> dict[str, Any]:
    """The summary of the run whose name is, or begins with, ``name``.

    Raises:
        CommandError: There is none, or there are several.
    """
    if not store.is_dir():
        raise CommandError(f"store is {store}, which is no folder; name the folder of the runs with --store.")
    summaries = {summary["run"]: summary for summary in read_summaries(store)}
    if name in summaries:
        return summaries[name]
    fitting = [run for run in summaries if name and run.startswith(name)]
    if len(fitting) == 1:
        return summaries[fitting[0]]
    if fitting:
        raise CommandError(f"run is {name}, and several runs begin so: {', '.join(fitting)}; write more of the name.")
    if not summaries:
        raise CommandError(f"run is {name}, and the store {store} has no runs; `eraselab run` makes them.")
    nearest = get_close_matches(name, summaries, n=1, cutoff=0.0)[0]
    raise CommandError(f"run is {name}, which the store {store} does not have; did you mean {nearest}? `eraselab runs` "
                       "lists them all.")


def job_of_summary(summary: Mapping[str, Any]) -> Job:
    """The job that a run did, built again from its config."""
    return build(config_of(summary), summary["choices"])


def object_of(summary: Mapping[str, Any], name: str) -> Any:
    """One of the objects that a run's config names, such as its ``model``."""
    return make_object(config_of(summary), name)


def config_of(summary: Mapping[str, Any]) -> DictConfig:
    """A run's config, with the fields that older runs lack."""
    config: DictConfig = OmegaConf.create(as_composed_now(summary["config"]))
    return config
