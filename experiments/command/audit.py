"""The jobs of an audit: one a attack, all on the same imported model."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.command.composing import compose_job
from experiments.command.config import build
from experiments.command.errors import CommandError, explain
from experiments.job.job import run_job
from experiments.job.settings import Job
from experiments.job.store import read_json, unchecked
from experiments.results.report.page import write_report
from experiments.results.screen import show_job

log = logging.getLogger(__name__)


def run_audit(
    model: str, concept: str, attacks: Sequence[str], overrides: Sequence[str], folder: Path, *, as_base: bool
) -> list[dict[str, Any]]:
    """Attack an erased model and write the report page; returns the summaries in the attacks' order.

    Every job is composed and checked before the first one starts.

    Args:
        model: Where it lies.
        concept: A choice of the group.
        attacks: Choices of the group.
        overrides: Further ones, for every job.
        folder: Each job's own folder is in it, by the attack's name, and the page.
        as_base: Whether the model itself is loaded, and not what it changes in a base model.

    Raises:
        CommandError: A job cannot be done; the sentence names its attack.
    """
    imported = (
        ["model=folder", f"model.source={model}", "eraser=none"]
        if as_base
        else ["eraser=imported", f"eraser.path={model}"]
    )
    common = [f"concept={concept}", "pruning=off", "tracker=off", *imported, *overrides]
    jobs = {attack: _checked_job(attack, [*common, f"attack={attack}"]) for attack in attacks}
    summaries = []
    for number, (attack, job) in enumerate(jobs.items(), start=1):
        log.info("[%d/%d] %s", number, len(jobs), attack)
        own = folder / attack
        own.mkdir(parents=True, exist_ok=True)
        path = run_job(job, own, show_job)
        summaries.append({**unchecked(read_json(path)), "path": str(path)})
    log.info("report: %s", write_report(summaries, folder))
    return summaries


def _checked_job(attack: str, overrides: Sequence[str]) -> Job:
    try:
        return build(*compose_job(overrides))
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        raise CommandError(f"attack {attack}: {sentence} --attacks=... leaves it out.") from error
