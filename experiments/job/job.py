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
from diffusion.model import TextToImage
from evaluation.prompt_sets import PromptRow
from evaluation.statistics import Rate
from experiments.job.checks import check_job
from experiments.job.cost import Cost
from experiments.job.origin import computing_threads, origin
from experiments.job.processes import ALONE, Processes
from experiments.job.prompts import job_prompts, tokens_cut_under_attack
from experiments.job.result import CaseResult, Summary, base_warnings
from experiments.job.settings import Job
from experiments.job.stages import Stages
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
    # The first process alone takes away what is made anew.
    store = Store(job.settings.store, fresh=job.settings.fresh and processes.first)
    _silence_libraries()
    model = job.model.load()
    log.info("model: %s, %d prompts and %d retained prompts", model.name, len(job.prompts), len(job.retained))
    with computing_threads(model, job.settings.threads):
        return _run(job, folder, show, processes, store, model)


def _run(
    job: Job, folder: Path, show: Callable[[Finished], None], processes: Processes, store: Store, model: TextToImage
) -> Path:
    rows, retained = job.prompts, job.retained
    check_job(job, model)
    sets = job_prompts(job, model)
    for kind, counts in sets.items():
        for sentence in counts.sentences(model, kind):
            log.warning(sentence)
    here = origin(model, processes.count)
    store.sign(here)
    with job.tracker.start(job, folder) as tracker:
        stages = Stages(job, store, model, processes)
        erased = stages.edit()
        tracker.log_losses(erased.losses)

        base = stages.pictures(rows, "base pictures")
        base_retained = stages.retained_pictures("base pictures of retained prompts")
        base_present = stages.verdicts(base)
        log.info("base: %d of %d pictures show %s", sum(base_present), len(rows), job.concept.name)
        for sentence in base_warnings(Rate.of(base_present), job.concept.name):
            log.warning(sentence)

        targets = stages.targets(base)

        with erased.edit.applied(model, fingerprint=stages.model_key["weights"]):
            plain = stages.pictures(rows, "pictures after erasing", erased.key)
            edited_retained = stages.retained_pictures("retained prompts after erasing", erased.key)
            attackable = attack_cases(rows, targets.images)
            attacked = stages.attack(attackable, erased)
            again = stages.found_on_new_seeds(attacked.outcomes, attackable, erased.key)
        if not processes.first:
            return folder / "summary.json"
        measures, measuring, measured_by = stages.measures(base_retained, edited_retained, retained)

        labels = stages.label_counts(base, plain, attacked)

        outcomes = attacked.outcomes
        cases = [
            CaseResult.of(outcome, base=present, too_long=too_long, cut=cut, attack_cut=attack_cut)
            for outcome, present, too_long, (cut, attack_cut) in zip(
                outcomes,
                base_present,
                attacked.too_long,
                tokens_cut_under_attack(model, outcomes, job.attack),
                strict=True,
            )
        ]
        # What the attack found is known now, and may be longer than what it put there.
        cut_by_attack = sum(case.attack_cut > 0 and not case.cut for case in cases)
        sets["prompts"] = replace(sets["prompts"], cut_by_attack=cut_by_attack)
        curve = success_curve(outcomes)
        tracker.log_curve(curve)
        summary = summarise(
            job,
            cases,
            model=model.name,
            sets=sets,
            identity=run_identity(stages, erased.name, rows, retained),
            measures=measures,
            labels=labels,
            curve=curve,
            costs={
                "base": Cost.total([base.cost, base_retained.cost, *([targets.cost] if targets is not base else [])]),
                "edit": erased.cost,
                "erased": Cost.total([plain.cost, edited_retained.cost]),
                "attack": attacked.cost,
                "measures": measuring,
                **({"transfer": again.cost} if again else {}),
            },
            edit={
                "hash": erased.name,
                "content": erased.key,
                "size_bytes": erased.edit.size_bytes,
                "metadata": erased.edit.metadata,
            },
            origin=here,
            origins={
                stage: [store.origin_of(name) for name in sorted(names)]
                for stage, names in {
                    "base": {*base.origins, *base_retained.origins, *targets.origins},
                    "edit": {erased.origin},
                    "erased": {*plain.origins, *edited_retained.origins},
                    "attack": set(attacked.origins),
                    "measures": set(measured_by),
                    **({"transfer": set(again.origins)} if again else {}),
                }.items()
            },
            artefacts={
                "base": str(base.folder),
                "edit": str(erased.folder),
                "erased": str(plain.folder),
                "attack": str(attacked.folder),
            },
            holds=stages.holding(attacked, again),
        )
        summary = replace(summary, unpruned=find_unpruned(summary, store))

        paths = [folder / "summary.json", store.folder("runs", summary.identity) / "summary.json"]
        for path in paths:
            write_found(path.with_name(FILE_NAME), outcomes)
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
