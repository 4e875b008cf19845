"""One job, from the command to its summary."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import transformers
from torch import Tensor

from attacks.cases import Outcome, PromptCase
from attacks.transfer import FILE_NAME, write_found
from diffusion.allocator import keep_freed_memory
from evaluation.prompt_sets import PromptRow
from experiments.job.cost import Cost
from experiments.job.picture_list import FILE_NAME as PICTURE_LIST
from experiments.job.picture_list import picture_list
from experiments.job.processes import ALONE, Processes
from experiments.job.result import CaseResult, Summary
from experiments.job.settings import Job
from experiments.job.stages import Stages, case_id
from experiments.job.store import Store, write_json
from experiments.job.summary import find_unpruned, run_identity, success_curve, summarise

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
    store = Store(job.settings.store)
    rows, retained = job.prompts, job.retained
    _silence_libraries()
    model = job.model.load()
    log.info("model: %s, %d prompts and %d retained prompts", model.name, len(rows), len(retained))

    with job.tracker.start(job, folder) as tracker:
        stages = Stages(job, store, model, processes)
        erased = stages.edit()
        tracker.log_losses(erased.losses)

        base = stages.pictures(rows, "base pictures")
        base_retained = stages.retained_pictures("base pictures of retained prompts")
        base_present = stages.verdicts(base)
        log.info("base: %d of %d pictures show %s", sum(base_present), len(rows), job.concept.name)

        targets = stages.targets(base)

        with erased.edit.applied(model, fingerprint=stages.model_key["weights"]):
            plain = stages.pictures(rows, "pictures after erasing", erased.key)
            edited_retained = stages.retained_pictures("retained prompts after erasing", erased.key)
            asked = attack_cases(rows, targets.images)
            attacked = stages.attack(asked, erased)
        if not processes.first:
            return folder / "summary.json"
        measures, measuring = stages.measures(base_retained, edited_retained, retained)

        labels = stages.label_counts(base, plain, attacked)

        outcomes = attacked.outcomes
        cases = [
            CaseResult.of(outcome, base=present, too_long=too_long)
            for outcome, present, too_long in zip(outcomes, base_present, attacked.too_long, strict=True)
        ]
        curve = success_curve(outcomes)
        tracker.log_curve(curve)
        summary = summarise(
            job,
            cases,
            model=model.name,
            identity=run_identity(stages, erased.key, rows, retained),
            measures=measures,
            labels=labels,
            curve=curve,
            costs={
                "base": Cost.total([base.cost, base_retained.cost, *([targets.cost] if targets is not base else [])]),
                "edit": erased.cost,
                "erased": Cost.total([plain.cost, edited_retained.cost]),
                "attack": attacked.cost,
                "measures": measuring,
            },
            edit={"hash": erased.key, "size_bytes": erased.edit.size_bytes, "metadata": erased.edit.metadata},
            artefacts={
                "base": str(base.folder),
                "edit": str(erased.folder),
                "erased": str(plain.folder),
                "attack": str(attacked.folder),
            },
        )
        summary = replace(summary, unpruned=find_unpruned(summary, store))

        paths = [folder / "summary.json", store.folder("runs", summary.identity) / "summary.json"]
        # What is too long for the protocol is not attacked, and its plain picture is the last.
        last = [
            path if too_long else attacked.folder / f"{case_id(case)}.png"
            for path, too_long, case in zip(plain.paths, attacked.too_long, asked, strict=True)
        ]
        listed = picture_list(
            store.root,
            rows,
            {"base": base.paths, "erased": plain.paths, "attacked": last},
            retained,
            {"base": base_retained.paths, "erased": edited_retained.paths},
        )
        for path in paths:
            write_found(path.with_name(FILE_NAME), outcomes)
            write_json(path.with_name(PICTURE_LIST), listed)
            write_json(path, summary.as_dict())
        finished = Finished(summary, paths, rows, base.images, plain.images, outcomes, folder)
        show(finished)
        tracker.log_results(finished.summary, finished.grid, base.images, plain.images, outcomes)
    return paths[-1]


def _silence_libraries() -> None:
    # Their bars for reading files are drawn off a terminal too, and say nothing that the log does not.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def attack_cases(rows: Sequence[PromptRow], targets: Tensor) -> list[PromptCase]:
    """What an attack is given: each prompt with the base model's picture of it, uint8 [n, 3, H, W], as its target."""
    return [
        PromptCase(row.case_number, row.prompt, row.seed, row.guidance, target)
        for row, target in zip(rows, targets, strict=True)
    ]
