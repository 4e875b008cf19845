"""A Hydra callback for multiruns: checks every job before the first one starts, and compares them at the end.

What is slow to import waits until every job is known to compose.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, read_write

from experiments.command.early import check_early
from experiments.command.errors import CommandError, one_sentence
from experiments.command.shorthands import name_unions, spell_out


def sweep_jobs(config: DictConfig, config_name: str) -> Iterator[DictConfig]:
    """Compose every job of a multirun (Hydra's basic sweeper), in its order."""
    arguments = [f"{key}={values}" for key, values in (config.hydra.sweeper.params or {}).items()]
    arguments += config.hydra.overrides.task
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    overrides = parser.parse_overrides(spell_out(arguments))
    for override in overrides:
        if override.is_sweep_override() and not any(True for _ in override.sweep_iterator()):
            raise CommandError(f"{override.input_line} has no values, so there is no job to run; give it at least one.")
    for batch in BasicSweeper.split_arguments(overrides, max_batch_size=None):
        for job_overrides in batch:
            yield compose(config_name, [*config.hydra.overrides.hydra, *job_overrides])


class Sweep(Callback):
    """Hears of the jobs of one multirun."""

    def __init__(self) -> None:
        self._summaries: list[Path] = []
        self._pictures: list[Path] = []

    def on_multirun_start(self, config: DictConfig, config_name: str = "config", **kwargs: Any) -> None:
        """Build every job's objects, so that a mistake in the last one shows before the first is run."""
        with one_sentence():
            jobs = list(sweep_jobs(config, config_name))
            for job in jobs:
                check_early(job)
            if (params := config.hydra.sweeper.params) and "attack" in params:
                # Hydra's sweeper reads it after this.
                with read_write(config):
                    params.attack = name_unions(str(params.attack))

            from experiments.command.config import build  # noqa: PLC0415
            from experiments.job.checks import check_jobs  # noqa: PLC0415

            check_jobs([build(job) for job in jobs])

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Remember where the job's results are."""
        if job_return.status == JobStatus.COMPLETED:
            self._summaries.append(Path(job_return.return_value))
            self._pictures.append(Path(config.hydra.runtime.output_dir) / "grid.png")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print one table of all runs."""
        from experiments.job.store import read_json  # noqa: PLC0415
        from experiments.results.screen import show_sweep  # noqa: PLC0415

        if self._summaries:
            show_sweep([read_json(path) for path in self._summaries], self._pictures)
