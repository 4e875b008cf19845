"""A Hydra callback for multiruns: checks every job before the first one starts, and compares them at the end."""

from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from experiments.config import build, sweep_jobs
from experiments.errors import one_sentence
from experiments.screen import show_sweep
from experiments.store import read_json


class Sweep(Callback):
    """Hears of the jobs of one multirun."""

    def __init__(self) -> None:
        self._summaries: list[Path] = []
        self._pictures: list[Path] = []

    def on_multirun_start(self, config: DictConfig, config_name: str = "config", **kwargs: Any) -> None:
        """Build every job's objects, so that a mistake in the last one shows before the first is run."""
        with one_sentence():
            for job in list(sweep_jobs(config, config_name)):
                build(job)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Remember where the job's results are."""
        if job_return.status == JobStatus.COMPLETED:
            self._summaries.append(Path(job_return.return_value))
            self._pictures.append(Path(config.hydra.runtime.output_dir) / "grid.png")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print one table of all runs."""
        if self._summaries:
            show_sweep([read_json(path) for path in self._summaries], self._pictures)
