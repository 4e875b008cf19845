"""Outcomes of an attack in the store: a line in a journal and the last picture each."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attacks.cases import Check, Outcome, PromptCase
from diffusion.files import set_aside
from experiments.job.journal import Journal
from experiments.job.pictures import picture_id, pixel_hash, read_picture, what_is_wrong, write_picture
from experiments.job.store import Store

log = logging.getLogger(__name__)

_OF_THE_STORE = frozenset({"id", "cost", "origin", "picture", "checks"})
"""What an entry says besides the fields of an outcome."""


def case_id(case: PromptCase) -> str:
    """The name of a case among the outcomes of one attack."""
    return f"{case.case_number}-{picture_id(case.prompt, case.seed, case.guidance)}"


def read_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """What the journals of all processes, of this run or an earlier one, say of the cases, by their names."""
    return {entry["id"]: entry for path in sorted(folder.glob("outcomes*.jsonl")) for entry in Journal(path).read()}


def look_at_outcomes(store: Store, folder: Path, names: Sequence[str]) -> None:
    """Drop damaged outcomes, and of the cases ``names`` those that are to be found anew."""
    asked = set(names)
    renewed = {name for name in asked if store.renews(folder / name)}

    def keep(entry: Mapping[str, Any]) -> bool:
        name, path = entry["id"], folder / f"{entry['id']}.png"
        if name not in asked:
            return True
        if name in renewed:
            return False
        if not path.exists():
            log.warning("%s is missing; the prompt of case %s is attacked again", path, entry["case_number"])
            return False
        if problem := what_is_wrong(path, {"pixels": entry["picture"]}):
            set_aside(path, problem)
            return False
        return True

    for path in sorted(folder.glob("outcomes*.jsonl")):
        Journal(path).mend(keep)


def write_outcome(
    outcome: Outcome, name: str, cost: Mapping[str, float], folder: Path, journal: Journal, origin: str
) -> None:
    """Write the last picture of the case ``name`` to ``folder``, and all else to its journal."""
    facts = {"prompt": outcome.adversarial_prompt, "success": outcome.success, **cost, "origin": origin}
    write_picture(folder / f"{name}.png", outcome.image, facts)
    fields = {key: value for key, value in vars(outcome).items() if key not in {"image", "checks"}}
    picture, checks = pixel_hash(outcome.image), [asdict(check) for check in outcome.checks]
    journal.append({"id": name, "cost": cost, "origin": origin, "picture": picture, **fields, "checks": checks})


def read_outcome(entry: Mapping[str, Any], folder: Path) -> Outcome:
    """The outcome that an entry of the journal in ``folder`` stands for."""
    fields = {key: value for key, value in entry.items() if key not in _OF_THE_STORE}
    image, _ = read_picture(folder / f"{entry['id']}.png")
    return Outcome(**fields, checks=tuple(Check(**check) for check in entry["checks"]), image=image)
