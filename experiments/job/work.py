"""The work of one job: an edit, pictures, an attack, measures, and the summary of them all."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from attacks.cases import Outcome, PromptCase
from attacks.transfer import FILE_NAME, write_found
from diffusion.progress import overheard
from evaluation.prompt_sets import PromptRow
from evaluation.statistics import Rate
from experiments.job.cost import Cost
from experiments.job.outcomes import case_id
from experiments.job.picture_list import FILE_NAME as PICTURE_LIST
from experiments.job.picture_list import picture_list
from experiments.job.pictures import Pictures
from experiments.job.prompts import job_prompts, tokens_cut_under_attack
from experiments.job.recording import Recorder
from experiments.job.result import CaseResult, Summary, base_warnings
from experiments.job.stages import Stages
from experiments.job.store import write_json
from experiments.job.summary import run_identity, success_curve, summarise

log = logging.getLogger(__name__)

SUMMARY = "summary.json"
"""What a run calls its summary."""


@dataclass(frozen=True)
class Worked:
    """What a job made.

    Attributes:
        summary: Its numbers.
        base: Pictures of the prompts by the unedited model.
        erased: The same by the edited model.
        outcomes: How the attack of each prompt ended.
        listed: Where its pictures lie; see :func:`experiments.job.picture_list.picture_list`.
    """

    summary: Summary
    base: Pictures
    erased: Pictures
    outcomes: Sequence[Outcome]
    listed: Any

    def write(self, folder: Path) -> Path:
        """Write the summary, the list of pictures and the prompts that were found; returns the summary's path."""
        write_found(folder / FILE_NAME, self.outcomes)
        write_json(folder / PICTURE_LIST, self.listed)
        write_json(folder / SUMMARY, self.summary.as_dict())
        return folder / SUMMARY


def work(stages: Stages, recorder: Recorder, origin: Mapping[str, Any]) -> Worked | None:
    """Go through the stages of a job, whose results are looked up or made.

    Args:
        stages: Of the job.
        recorder: Hears of the losses and of the attack's curve.
        origin: Who works; see :func:`experiments.job.origin.origin`.

    Returns:
        What the first process has put together; None in all others.

    Raises:
        ValueError: The model or an artefact cannot be used, or a method cannot do what it is asked.
        OSError: The store cannot be written to, or a file is missing.
    """
    job, store, model = stages.job, stages.store, stages.model
    rows, retained = job.prompts, job.retained
    # Jobs that share a store in one process each say what they stand on themselves.
    used_before, store.used = store.used, set()
    with overheard(recorder.hear_loss):
        erased = stages.edit()
    recorder.log_losses(erased.losses)

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
        attackable = _attack_cases(rows, targets.images)
        with overheard(recorder.hear_attack):
            attacked = stages.attack(attackable, erased)
        again = stages.found_on_new_seeds(attacked.outcomes, attackable, erased.key)
    if not stages.processes.first:
        return None
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
    sets = job_prompts(job, model)
    cut_by_attack = sum(case.attack_cut > 0 and not case.cut for case in cases)
    sets["prompts"] = replace(sets["prompts"], cut_by_attack=cut_by_attack)
    curve = success_curve(outcomes)
    recorder.log_curve(curve)
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
        origin=dict(origin),
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
    summary = replace(summary, uses=sorted(store.used))
    store.used |= used_before
    # What is too long for the protocol is not attacked, and its plain picture is the last.
    last = [
        path if too_long else attacked.folder / f"{case_id(case)}.png"
        for path, too_long, case in zip(plain.paths, attacked.too_long, attackable, strict=True)
    ]
    listed = picture_list(
        store.root,
        rows,
        {"base": base.paths, "erased": plain.paths, "attacked": last},
        retained,
        {"base": base_retained.paths, "erased": edited_retained.paths},
    )
    return Worked(summary, base, plain, outcomes, listed)


def _attack_cases(rows: Sequence[PromptRow], targets: Tensor) -> list[PromptCase]:
    """What an attack is given: each prompt with the base model's picture of it, uint8 [n, 3, H, W], as its target."""
    return [
        PromptCase(row.case_number, row.prompt, row.seed, row.guidance, target)
        for row, target in zip(rows, targets, strict=True)
    ]
