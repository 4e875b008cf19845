"""A Hydra callback: jobs are checked before the first one starts, and those of a sweep are told about at its end.

Jobs of a sweep may run in other processes and on other machines. Each leaves a record in the sweep's folder, and the
closing words are read from there. What is slow to import waits until every job is known to compose.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict, read_write

from experiments.command.composing import plain_job, sweep_jobs, swept_by_preset, told_apart, typed
from experiments.command.early import check_early
from experiments.command.errors import VisibleFormatter, one_sentence
from experiments.command.launchers import check_launcher
from experiments.command.records import Record

if TYPE_CHECKING:
    from experiments.job.settings import Job


class Sweep(Callback):
    """Hears of the jobs of one command."""

    def __init__(self) -> None:
        self._names: list[list[str]] = []

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the only job, before it has a folder."""
        with one_sentence():
            _check([config])
            self._plan_only([config])

    def on_multirun_start(self, config: DictConfig, config_name: str = "config", **kwargs: Any) -> None:
        """Build every job's objects, so that a mistake in the last one shows before the first is run."""
        with one_sentence():
            check_launcher(config)
            # Hydra's sweeper reads them after this.
            with read_write(config), open_dict(config):
                config.hydra.sweeper.params = swept_by_preset(config)
            jobs = list(sweep_jobs(config, config_name))
            self._names = [list(job.hydra.overrides.task) for job in jobs]
            checked = _check(jobs)
            self._plan_only(jobs)
            _check_loaded(checked, self._names)
            Record.forget_all(Path(config.hydra.sweep.dir))

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Put a job's number before all that it logs, and say what it is."""
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        number, count = int(config.hydra.job.num), len(self._names)
        for handler in logging.getLogger().handlers:
            handler.setFormatter(VisibleFormatter(f"%(asctime)s [{number + 1}/{count}] %(message)s", "%H:%M:%S"))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print one table of all runs, then what failed; failures are the exit status."""
        from experiments.job.store import read_json  # noqa: PLC0415
        from experiments.results.screen import show_sweep  # noqa: PLC0415

        records = Record.read_all(Path(config.hydra.sweep.dir))
        made = [record for record in records if record.summary]
        if made:
            show_sweep([read_json(Path(r.summary)) for r in made if r.summary], [Path(r.grid) for r in made if r.grid])
        failures = {record.number: record.failure for record in records if record.failure}
        recorded = {record.number for record in records}
        silent = "It ended without a word, as if it had been killed."
        failures |= {number: silent for number in range(len(self._names)) if number not in recorded}
        if failures:
            for number, failure in sorted(failures.items()):
                print(f"Job {number + 1} failed ({' '.join(self._names[number])}): {failure}", file=sys.stderr)
            sys.exit(
                f"{len(failures)} of {len(self._names)} jobs failed, as said above; the same command runs them again."
            )

    def _plan_only(self, jobs: Sequence[DictConfig]) -> None:
        if any(job.dry_run for job in jobs):
            from experiments.command.plan import show_plan  # noqa: PLC0415

            show_plan(jobs)
            sys.exit(0)


def _check(jobs: Sequence[DictConfig]) -> list["Job"]:
    """Look for the models and build the objects of all jobs, which are returned.

    Raises:
        CommandError: One of them cannot be done; the sentence says which.
    """
    for job in jobs:
        check_early(job)

    from experiments.command.config import build  # noqa: PLC0415

    built = []
    named = [typed(job.hydra.overrides.task) for job in jobs]
    for number, job in enumerate(jobs, start=1):
        with told_apart(number, named):
            built.append(build(*plain_job(job)))
    return built


def _check_loaded(jobs: Sequence["Job"], named: Sequence[Sequence[str]]) -> None:
    """Check what can only be known with the models at hand, which are loaded for it.

    Raises:
        CommandError: A job cannot be done; the sentence says which.
    """
    from experiments.job.checks import check_jobs  # noqa: PLC0415

    check_jobs(jobs, lambda number: told_apart(number, named))
