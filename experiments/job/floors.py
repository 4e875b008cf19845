"""A job's floor and ceiling: the same attack on the model that never knew the concept and on the unedited one.

Both are jobs like any others, ``eraser=retrained pruning=off`` and ``eraser=none pruning=off`` with everything else as
it was: a run of theirs that lies in the store is taken, whoever made it, and a missing one is made and kept there.

Models without a twin that never knew can have a control in its place, see :data:`CONTROLS`. A control tells less: what
an attack finds above it may be knowledge, or what it takes a trained model to compose.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from omegaconf import OmegaConf

from attacks.none import NoAttack
from attacks.relearn import FIRST_COSINE, Relearn, variant_step
from diffusion.canvas.canvases import CANVASES, network_folder
from diffusion.canvas.knowledge import FORGOTTEN, Twin
from diffusion.canvas.source import CanvasSource
from erasure.erasers.foreign_prompt import ForeignPrompt
from erasure.erasers.none import NoEraser
from erasure.erasers.output_zero import OutputZero
from erasure.erasers.random_weights import RandomWeights
from erasure.erasers.retrained import Retrained
from erasure.protocols import Eraser
from erasure.pruning.off import Off
from evaluation.floors import AboveFloor, Calibrated
from evaluation.savings import NEVER, Savings
from evaluation.statistics import Groups, Rate
from experiments import CONFIG_FOLDER
from experiments.job.recording import Off as NoRecord
from experiments.job.recording import Silent
from experiments.job.result import RUNS, Summary
from experiments.job.settings import Job
from experiments.job.stages import Stages
from experiments.job.store import SCHEMA_VERSION, read_json, unchecked
from experiments.job.summary import run_identity
from experiments.job.work import SUMMARY, work

log = logging.getLogger(__name__)

CONTROLS: Mapping[str, tuple[type[Eraser], str]] = MappingProxyType(
    {
        "output_zero": (OutputZero, "a U-Net that predicts nothing"),
        "random_weights": (RandomWeights, "a U-Net with random weights"),
        "foreign_prompt": (ForeignPrompt, "the unedited model under a foreign prompt, which knows and hides it"),
    }
)
"""What may stand in place of a model that never knew, by the choice of the eraser that leads there; and in words."""

_RELEARN = f"{Relearn.__module__}.{Relearn.__qualname__}"

NEVER_KNEW = "a model that never knew"
"""In words, what a floor is of."""

References = dict[str, dict[str, Any]]
"""Summaries of the runs that a job is compared with: its ``floor`` and its ``ceiling``."""


def never_knew(job: Job) -> Twin:
    """The model that was trained as the job's own, and never knew its concept.

    Raises:
        LookupError: There is none; the message says why.
    """
    model, concept = job.model, job.concept.name
    if not isinstance(model, CanvasSource):
        names = ", ".join(f"model={name}" for name in CANVASES)
        raise LookupError(f"only the canvases ({names}) have models that never knew a concept")
    if model.knows != "all":
        raise LookupError(f"the model itself never knew something (model.knows={model.knows})")
    lacking = [knows for knows, forgotten in FORGOTTEN.items() if concept in forgotten]
    if not lacking:
        raise LookupError(f"no model was trained without {concept}")
    missing: list[str] = []
    for knows in sorted(lacking, key=lambda knows: len(FORGOTTEN[knows])):
        twin = Twin(knows, model.training_seed)
        try:
            network_folder(model.source, twin, model.build)
        except (FileNotFoundError, ValueError) as error:
            missing.append(str(error))
        else:
            return twin
    raise LookupError(missing[0].rstrip("."))


def check_floor(job: Job) -> None:
    """See to it that a floor that is asked for can be had.

    Raises:
        ValueError: ``floor=on``, and there is no model for it.
    """
    if job.settings.floor == "on":
        try:
            never_knew(job)
        except LookupError as error:
            raise ValueError(
                f"floor is on, and there is none: {error.args[0]}. floor=off does without, and "
                f"{', '.join(CONTROLS)} compare with a control."
            ) from error


def asks_for_floor(job: Job) -> bool:
    """Whether the job is to have a floor; where ``auto`` finds that there is none, the log says why."""
    if job.settings.floor == "auto":
        try:
            if isinstance(job.attack, NoAttack):
                raise LookupError("nothing is attacked; floor=on measures the plain prompts' floor")
            never_knew(job)
        except LookupError as error:
            log.info("floor: none, as %s; floor=%s compare with a control", error.args[0], ", ".join(CONTROLS))
            return False
    return job.settings.floor != "off"


def reference_jobs(job: Job) -> dict[str, Job]:
    """The jobs whose attacks are a job's ``floor``, or the control in its place, and its ``ceiling``.

    Raises:
        LookupError: There is no model that never knew the concept.
    """
    if job.settings.floor in CONTROLS:
        choice, (kind, _) = job.settings.floor, CONTROLS[job.settings.floor]
        floor = _reference(job, choice, _config("eraser", choice, job), kind)
    else:
        retrained = _config("eraser", "retrained", job) | {"knows": never_knew(job).knows}
        floor = _reference(job, "retrained", retrained, Retrained)
    return {
        "floor": floor,
        "ceiling": _reference(job, "none", _config("eraser", "none", job), NoEraser),
    }


def run_references(stages: Stages, origin: Mapping[str, Any]) -> References:
    """Look up the runs of a job's floor and ceiling in the store, or make them with the model that is loaded.

    Args:
        stages: Of the job; its model is unedited.
        origin: Who works; see :func:`experiments.job.origin.origin`.

    Returns:
        Their summaries.

    Raises:
        ValueError: The attack cannot be run on one of the models, or an artefact cannot be used.
        OSError: The store cannot be written to.
    """
    started = time.perf_counter()
    jobs = reference_jobs(stages.job)
    found = {
        name: _run(name, Stages(job, stages.store, stages.model, stages.processes), origin)
        for name, job in jobs.items()
    }
    log.info("floor and ceiling: %.1f s", time.perf_counter() - started)
    return found


def above_floor(summary: Summary, references: References) -> Summary:
    """``summary`` with what its success under attack is beside floor and ceiling.

    Each case says whether it succeeded there, and ``floor`` has the rates of ``floor`` and ``ceiling``, the
    ``excess`` over the floor in points with its interval, the ``calibrated`` success (None: floor and ceiling are too
    close), the ``verdict`` in words, how the interval was made, the names of the ``runs`` and their cost in
    ``unet_evaluations``, beside that of the job itself. ``of`` says what the floor is of, in words; ``control`` which
    control it is, None for a model that never knew. ``measures`` are what the
    evaluators say of the floor's model; ``savings`` is there for relearning alone.
    """
    shown = {name: [bool(case["attacked"]) for case in found["cases"]] for name, found in references.items()}
    cases = [
        replace(case, floor=floor, ceiling=ceiling)
        for case, floor, ceiling in zip(summary.cases, shown["floor"], shown["ceiling"], strict=True)
    ]
    attacked = [case.attacked for case in cases]
    prompts = [case.prompt or case.case_number for case in cases]
    choice = references["floor"]["choices"]["eraser"]
    control = choice if choice in CONTROLS else None
    above = AboveFloor.of_pair(attacked, shown["floor"], prompts, reference="control" if control else "floor")
    calibrated = Calibrated.of_pair(attacked, shown["floor"], shown["ceiling"], prompts)
    evaluations = {name: found["costs"]["attack"]["unet_evaluations"] for name, found in references.items()}
    block = {
        **{name: Rate.of(present, prompts).as_dict() for name, present in shown.items()},
        **above.as_dict(),
        "calibrated": calibrated and calibrated.as_dict(),
        "knows": references["floor"]["config"]["eraser"].get("knows"),
        "control": control,
        "of": CONTROLS[control][1] if control else NEVER_KNEW,
        "runs": {name: found["run"] for name, found in references.items()},
        "measures": references["floor"]["measures"],
        "savings": _savings(summary, references, prompts),
        "unet_evaluations": {"attacked": summary.costs["attack"].unet_evaluations, **evaluations},
    }
    return replace(summary, cases=cases, floor=block)


def _savings(summary: Summary, references: References, groups: Groups) -> dict[str, Any] | None:
    """Of relearning, what :class:`evaluation.savings.Savings` says, with the first step's cosines; None of others."""
    attack = summary.config["attack"]
    if attack.get("_target_") != _RELEARN:
        return None
    runs = {"attacked": [asdict(case) for case in summary.cases]}
    runs |= {name: found["cases"] for name, found in references.items()}
    first = {name: [_first_step(case) for case in cases] for name, cases in runs.items()}
    savings = Savings.of(first["attacked"], first["floor"], first["ceiling"], attack["checks"], groups)
    cosines = {
        name: next((case["measured"][FIRST_COSINE] for case in cases if FIRST_COSINE in case["measured"]), None)
        for name, cases in runs.items()
        if name != "ceiling"
    }
    return {**savings.as_dict(), "pictures": attack["pictures"], "first_step_cosine": cosines}


def _first_step(case: Mapping[str, Any]) -> float:
    """After how many training steps a case showed the concept."""
    if case["erased"]:
        return 0
    return variant_step(case["variant"]) if case["attacked"] else NEVER


def _run(name: str, stages: Stages, origin: Mapping[str, Any]) -> dict[str, Any]:
    """The summary of a reference run, from the store or made now; empty in other processes than the first."""
    job, store, processes = stages.job, stages.store, stages.processes
    identity = run_identity(stages, stages.edit().name, job.prompts, job.retained)
    folder = store.folder(RUNS, identity)
    path = folder / SUMMARY

    def look() -> None:
        if store.renews(path):
            path.unlink(missing_ok=True)

    with processes.under(store.locked(folder, look)):
        # All processes read the same before any of them goes on to write: the first stage is a meeting.
        found = _read(path)
        if found is not None:
            log.info("%s: run %s found in the store", name, found["run"])
            return found
        log.info("%s: the same attack on %s", name, _model_in_words(job))
        worked = work(stages, Silent(), origin)
        if worked is None:
            return {}
        worked.write(folder)
        return worked.summary.as_dict()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = unchecked(read_json(path))
    except (OSError, ValueError):
        return None
    return found if found.get("schema") == SCHEMA_VERSION else None


def _model_in_words(job: Job) -> str:
    if isinstance(job.eraser, Retrained):
        return f"the model that never knew {job.concept.name} ({job.eraser.knows})"
    choice = job.choices["eraser"]
    return CONTROLS[choice][1] if choice in CONTROLS else "the unedited model"


def _config(group: str, choice: str, job: Job) -> dict[str, Any]:
    """The plain config of a choice, as it would be composed for this job."""
    own = OmegaConf.load(CONFIG_FOLDER / group / f"{choice}.yaml")
    composed = OmegaConf.create({"model": job.config["model"], "concept": job.config["concept"], group: own})
    plain: dict[str, Any] = OmegaConf.to_container(composed[group], resolve=True)  # type: ignore[assignment]
    return plain


def _reference(job: Job, choice: str, config: Mapping[str, Any], kind: type[Eraser]) -> Job:
    """``job`` with another eraser and no pruning, of which nobody hears."""
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]  # erasers are dataclasses
    parts = {"eraser": dict(config), "pruning": _config("pruning", "off", job), "floor": "off"}
    told = {path: text for path, text in job.config.get("taken", {}).items() if path.partition(".")[0] not in parts}
    return replace(
        job,
        eraser=kind(**{name: value for name, value in config.items() if name in known}),
        pruning=Off(),
        tracker=NoRecord(),
        settings=replace(job.settings, floor="off"),
        config={**job.config, **parts, "taken": told},
        choices={**{k: v for k, v in job.choices.items() if k != "method"}, "eraser": choice, "pruning": "off"},
    )
