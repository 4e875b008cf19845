"""From a composed config to a finished job, in one process or in several."""

import logging.config
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from experiments.command.config import build
from experiments.command.early import canvas_settings
from experiments.command.errors import one_sentence
from experiments.job.job import run_job
from experiments.job.processes import Processes, run_in_processes
from experiments.job.recording import Off
from experiments.results.screen import show_job

log = logging.getLogger(__name__)


def launch(config: DictConfig) -> Path:
    """Run the job that Hydra composed; returns the path of its summary.

    Raises:
        CommandError: A value or a field of the config is wrong.
        ValueError: The job cannot be done.
        OSError: A file is missing, or a folder cannot be written to.
    """
    runtime = HydraConfig.get().runtime
    job, folder = build(config, runtime.choices), Path(runtime.output_dir)
    for sentence in canvas_settings(job.choices):
        log.warning(sentence)
    if job.settings.processes == 1:
        return run_job(job, folder, show_job)
    log_config = OmegaConf.to_container(HydraConfig.get().job_logging, resolve=True)
    run_in_processes(job.settings.processes, run_share, job.config, job.choices, folder, log_config)
    return folder / "summary.json"


def run_share(
    processes: Processes,
    config: Mapping[str, Any],
    choices: Mapping[str, str],
    folder: Path,
    log_config: Mapping[str, Any],
) -> None:
    """Do what one of several processes does; only the first logs, as ``log_config`` says, and is tracked."""
    if torch.cuda.is_available():
        torch.cuda.set_device(processes.index % torch.cuda.device_count())
    with one_sentence():
        job = build(OmegaConf.create(dict(config)), choices)
        if processes.first:
            logging.config.dictConfig(dict(log_config))
        else:
            job = replace(job, tracker=Off())
        run_job(job, folder, show_job, processes)
