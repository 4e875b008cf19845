"""Which runs in the store are those of an experiment preset."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments import CONFIG_FOLDER
from experiments.command.composing import plain_job, sweep_jobs
from experiments.command.config import PROMPT_SETS
from experiments.command.errors import CommandError
from experiments.command.shorthands import spell_out
from experiments.job.settings import matters
from experiments.job.summary import read_summaries
from experiments.results.tables import GROUPS

_NOT_NUMBERS = {"store", "tracker", "dry_run"}


def experiment_jobs(experiment: str, overrides: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The composed configs of every job of an experiment preset, as plain data."""
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        sweep = compose("config", [f"+experiment={experiment}", *spell_out(overrides)], return_hydra_config=True)
        jobs = [plain_job(job)[0] for job in sweep_jobs(sweep, "config")]
        return [OmegaConf.to_container(job, resolve=True) for job in jobs]  # type: ignore[misc]


def as_composed_now(config: Mapping[str, Any]) -> dict[str, Any]:
    """A job's plain config with the fields that older jobs lack, which say what those jobs did."""
    if config.keys() >= {*PROMPT_SETS, "protocol", "retained_sampling"}:
        return dict(config)
    own = {key: OmegaConf.load(CONFIG_FOLDER / key / "own.yaml") for key in PROMPT_SETS}
    added = {**own, **OmegaConf.load(CONFIG_FOLDER / "protocol" / "none.yaml"), "retained_sampling": None}
    completed = OmegaConf.create({**added, **config, "model": {"resolution": None, **config["model"]}})
    return OmegaConf.to_container(completed, resolve=True)  # type: ignore[return-value]


def find_run(job: Mapping[str, Any], summaries: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The newest run with the config of ``job``."""
    wanted = _numbers_config(job)
    return next((summary for summary in summaries if _numbers_config(summary["config"]) == wanted), None)


def collect_runs(experiment: str, overrides: Sequence[str] = ()) -> tuple[list[dict[str, Any]], list[str]]:
    """The summaries of an experiment's jobs, in their order, and the names of the jobs that were not run yet.

    Raises:
        CommandError: None was run.
    """
    jobs = experiment_jobs(experiment, overrides)
    # Once, and not again for every job.
    summaries = [
        {**summary, "config": as_composed_now(summary["config"])} for summary in read_summaries(Path(jobs[0]["store"]))
    ]
    runs = [find_run(job, summaries) for job in jobs]
    found = [run for run in runs if run is not None]
    if not found:
        raise CommandError(
            f"The store {jobs[0]['store']} has no run of {experiment}; make them with "
            f"`python run.py -m +experiment={experiment}`."
        )
    return found, [_job_name(job) for job, run in zip(jobs, runs, strict=True) if run is None]


def _job_name(job: Mapping[str, Any]) -> str:
    classes = [f"{group} {job[group]['_target_'].rpartition('.')[2]}" for group in GROUPS]
    return ", ".join([str(job["concept"]["name"]), *classes])


def _numbers_config(config: Mapping[str, Any]) -> Any:
    return matters({key: value for key, value in as_composed_now(config).items() if key not in _NOT_NUMBERS})
