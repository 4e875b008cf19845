"""From a composed config to a finished job, in one process or in several."""

import logging.config
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from experiments.command.composing import typed
from experiments.command.config import build
from experiments.command.errors import explain, one_sentence
from experiments.command.records import Record
from experiments.job.job import GRID, run_job
from experiments.job.processes import Processes, run_in_processes
from experiments.job.recording import Off
from experiments.results.screen import show_job

log = logging.getLogger(__name__)


def launch(config: DictConfig) -> Path | None:
    """Run the job that Hydra composed.

    A job of a sweep that fails says so, leaves a record for the closing words, and lets the others run.

    Returns:
        The path of its summary; None if it is one of a sweep and failed.

    Raises:
        CommandError: A value or a field of the config is wrong.
        ValueError: The job cannot be done.
        OSError: A file is missing, or a folder cannot be written to.
    """
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    if hydra.mode != RunMode.MULTIRUN:
        return _run(config, hydra, folder)
    number, overrides, sweep = int(hydra.job.num), typed(hydra.overrides.task), Path(hydra.sweep.dir)
    try:
        summary = _run(config, hydra, folder)
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            log.exception("this job failed by a fault of the program")
            sentence = f"A fault of the program, {type(error).__name__}: {error}"
        else:
            log.error("this job failed: %s", sentence)
        Record(number, overrides, failure=sentence).write(sweep)
        return None
    Record(number, overrides, summary=str(summary), grid=str(folder / GRID)).write(sweep)
    return summary


def _run(config: DictConfig, hydra: Any, folder: Path) -> Path:
    job = build(config, hydra.runtime.choices)
    for path, settings in job.config.get("taken", {}).items():
        log.info("%s has %s", path, settings)
    if job.settings.processes == 1:
        return run_job(job, folder, show_job)
    log_config = OmegaConf.to_container(hydra.job_logging, resolve=True)
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
