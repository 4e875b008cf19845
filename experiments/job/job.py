"""One job, from the command to its summary."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import transformers
from torch import Tensor

from attacks.cases import Outcome
from attacks.transfer import FILE_NAME
from diffusion.allocator import keep_freed_memory
from diffusion.model import TextToImage
from evaluation.prompt_sets import PromptRow
from experiments.job.checks import check_job
from experiments.job.floors import above_floor, asks_for_floor, run_references
from experiments.job.origin import computing_threads, origin
from experiments.job.processes import ALONE, Processes
from experiments.job.prompts import job_prompts
from experiments.job.remote_store import open_store
from experiments.job.result import RUNS, Summary
from experiments.job.settings import Job
from experiments.job.stages import Stages
from experiments.job.store import Store
from experiments.job.summary import find_unpruned
from experiments.job.work import SUMMARY, Worked, work

log = logging.getLogger(__name__)

GRID = "grid.png"
"""Name of the picture of a job, in its run's folder."""


@dataclass(frozen=True)
class Finished:
    """A job at its end, for whoever shows it.

    Attributes:
        summary: Its numbers.
        paths: Where the summary was written, the store's copy last.
        rows: The prompts.
        base: Pictures of them by the unedited model, uint8 [n, 3, H, W].
        erased: The same by the edited model.
        outcomes: How the attack of each prompt ended.
        folder: The run's own folder.
    """

    summary: Summary
    paths: Sequence[Path]
    rows: Sequence[PromptRow]
    base: Tensor
    erased: Tensor
    outcomes: Sequence[Outcome]
    folder: Path

    @property
    def prompts(self) -> Path:
        """The file of the prompts that the attack found."""
        return self.paths[-1].with_name(FILE_NAME)

    @property
    def grid(self) -> Path:
        """Where a picture of it goes."""
        return self.folder / GRID


def run_job(job: Job, folder: str | Path, show: Callable[[Finished], None], processes: Processes = ALONE) -> Path:
    """Erase, attack, judge, and write down what came of it.

    Args:
        job: What to do.
        folder: The run's own folder, for the summary and what is shown of it.
        show: Shows the finished job to people, and draws :attr:`Finished.grid`.
        processes: Who shares the pictures and the attack.

    Returns:
        Path of the summary, which the first process writes.

    Raises:
        ValueError: The model or an artefact cannot be used, or a method cannot do what it is asked.
        OSError: The store cannot be written to, or a file is missing.
    """
    keep_freed_memory()
    folder = Path(folder)
    # The first process alone takes away what is made anew.
    store = open_store(job.settings.store, fresh=job.settings.fresh and processes.first)
    _silence_libraries()
    model = job.model.load()
    log.info("model: %s, %d prompts and %d retained prompts", model.name, len(job.prompts), len(job.retained))
    with computing_threads(model, job.settings.threads):
        return _run(job, folder, show, processes, store, model)


def _run(
    job: Job, folder: Path, show: Callable[[Finished], None], processes: Processes, store: Store, model: TextToImage
) -> Path:
    rows = job.prompts
    check_job(job, model)
    sets = job_prompts(job, model)
    for kind, counts in sets.items():
        for sentence in counts.sentences(model, kind):
            log.warning(sentence)
    here = origin(model, processes.count)
    store.sign(here)
    with job.tracker.start(job, folder) as tracker:
        stages = Stages(job, store, model, processes)
        worked = work(stages, tracker, here)
        if worked is not None:
            worked = replace(worked, summary=replace(worked.summary, unpruned=find_unpruned(worked.summary, store)))
            _write_to(store, worked)
        references = run_references(stages, here) if asks_for_floor(job) else None
        if worked is None:
            return folder / SUMMARY
        if references:
            worked = replace(worked, summary=above_floor(worked.summary, references))
        paths = [worked.write(folder), _write_to(store, worked)]
        base, erased, outcomes = worked.base.images, worked.erased.images, worked.outcomes
        finished = Finished(worked.summary, paths, rows, base, erased, outcomes, folder)
        show(finished)
        tracker.log_results(finished.summary, finished.grid, base, erased, outcomes)
    return paths[-1]


def _write_to(store: Store, worked: Worked) -> Path:
    folder = store.folder(RUNS, worked.summary.identity)
    # What is new is not to be taken for what was there before, and whoever needs the run waits for all of it.
    store.renews(folder / SUMMARY)
    with store.locked(folder):
        return worked.write(folder)


def _silence_libraries() -> None:
    # Their bars for reading files are drawn off a terminal too, and say nothing that the log does not.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
