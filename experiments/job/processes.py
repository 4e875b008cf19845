"""Several processes, one for each GPU, share the prompts of a job: ``python run.py processes=4 ...``.

Every process runs the same job on the same store. Pictures and attacks are divided, prompt by prompt; the first process
erases while the others wait. A prompt's result depends on nothing but the prompt, so their number changes no number.
"""

import logging.config
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import multiprocessing
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

Item = TypeVar("Item")


@dataclass(frozen=True)
class Processes:
    """The processes of a job, seen from one of them.

    Attributes:
        index: The number of this one, from 0.
        count: How many there are.
        barrier: Where they meet; None for one alone.
    """

    index: int = 0
    count: int = 1
    barrier: Barrier | None = None

    @property
    def first(self) -> bool:
        """Whether this one does what is done once."""
        return self.index == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Every ``count``-th of ``items``: what is this process's to do."""
        return list(items[self.index :: self.count])

    def meet(self) -> None:
        """Wait until every process is here."""
        if self.barrier is not None:
            self.barrier.wait()

    @contextmanager
    def under(self, lock: AbstractContextManager[None]) -> Iterator[None]:
        """Work in one place, all at a time: the first process holds ``lock`` until the last one is done."""
        if self.first:
            with lock:
                self.meet()
                yield
                self.meet()
        else:
            self.meet()
            yield
            self.meet()


ALONE = Processes()
"""The one process of a job that is not shared."""


def run_in_processes(
    count: int, config: Mapping[str, Any], choices: Mapping[str, str], folder: Path, log_config: Mapping[str, Any]
) -> Path:
    """Run one job in ``count`` processes, each on a GPU of its own if there are GPUs; returns the path of its summary.

    There is no process group: torchmetrics would take each process's numbers for a part of the whole.

    Args:
        count: Number of processes.
        config: The job's whole config, resolved.
        choices: Which file each group took.
        folder: The run's own folder.
        log_config: How the first process logs, for ``logging.config.dictConfig``; the others keep silent.

    Raises:
        ChildProcessError: A process failed; it has said why.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    # A fork server imports the project once for all of them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.job.job"])
    arguments = (count, context.Barrier(count), config, choices, folder, log_config)
    try:
        start_processes(_run_share, arguments, nprocs=count, start_method="forkserver")  # type: ignore[no-untyped-call]
    except ProcessExitedException as error:
        raise ChildProcessError(f"Process {error.error_index} of {count} failed; it says above why.") from error
    return folder / "summary.json"


def _run_share(
    index: int,
    count: int,
    barrier: Barrier,
    config: Mapping[str, Any],
    choices: Mapping[str, str],
    folder: Path,
    log_config: Mapping[str, Any],
) -> None:
    """Do what one of the processes does."""
    # These import the stages, which import this module.
    from omegaconf import OmegaConf  # noqa: PLC0415

    from experiments.command.config import build  # noqa: PLC0415
    from experiments.command.errors import one_sentence  # noqa: PLC0415
    from experiments.job.job import run_job  # noqa: PLC0415
    from experiments.results.tracking import Off  # noqa: PLC0415

    if torch.cuda.is_available():
        torch.cuda.set_device(index % torch.cuda.device_count())
    processes = Processes(index, count, barrier)
    with one_sentence():
        job = build(OmegaConf.create(dict(config)), choices)
        if processes.first:
            logging.config.dictConfig(dict(log_config))
            run_job(job, folder, processes)
        else:
            run_job(replace(job, tracker=Off()), folder, processes)
