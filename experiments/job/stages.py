"""The stages of a job: each is looked up in the store, and worked on only where it is not complete."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, is_dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attacks.cases import Check, Outcome, PromptCase, evaluations_paid
from attacks.none import NoAttack
from attacks.protocols import Attack, is_given_original
from attacks.union import Union
from diffusion.model import TextToImage
from diffusion.progress import progress_bar
from diffusion.sampling import Sampling
from erasure.edit import Edit
from evaluation.prompt_sets import PromptRow
from evaluation.quality import Measures
from evaluation.verdicts import LabelCounts, Verdicts, label_counts
from experiments.job.cost import Cost, Meter
from experiments.job.measuring import Measuring, measure_pictures
from experiments.job.pictures import Pictures, make_pictures, picture_id, read_picture, write_picture
from experiments.job.processes import ALONE, Processes
from experiments.job.protocol import TargetSampling
from experiments.job.settings import SPEED_ONLY, TRAINING_SPEED_ONLY, Job, matters
from experiments.job.store import Journal, Store, canonical_json, content_hash, read_json, write_json

log = logging.getLogger(__name__)

CONCEPT_FILES = frozenset({"prompts", "retained_prompts", "pairs"})
"""Fields of a concept that no eraser reads."""

_NO_ATTACK_KEY = {"_target_": "attacks.none.NoAttack"}
"""The key of ``attack=none``, whose outcomes are those of prompts that are not attacked."""


@dataclass(frozen=True)
class StoredEdit:
    """An edit and how it came about.

    Attributes:
        edit: As read back from the disk, whether it was made now or before.
        key: Its hash; ``none`` if it changes nothing.
        losses: The objective at every optimiser step.
        cost: What it cost when it was made.
        folder: Where it lies.
    """

    edit: Edit
    key: str
    losses: list[float]
    cost: Cost
    folder: Path


@dataclass(frozen=True)
class Attacked:
    """The outcomes of all cases, in their order, and what they cost when they were found.

    Attributes:
        outcomes: One for each case.
        cost: Of all together.
        folder: Where they lie.
        key: Hash of everything that they depend on.
        too_long: Of each case whether the protocol leaves its prompt out of the attack.
    """

    outcomes: list[Outcome]
    cost: Cost
    folder: Path
    key: str
    too_long: list[bool]


class Stages:
    """What the stages of one job share.

    Args:
        job: What is asked for.
        store: Where artefacts lie.
        model: The loaded model, unedited between stages.
        processes: Who shares pictures and attacks.
    """

    def __init__(self, job: Job, store: Store, model: TextToImage, processes: Processes = ALONE) -> None:
        self.job = job
        self.store = store
        self.model = model
        self.processes = processes

    @cached_property
    def model_key(self) -> dict[str, Any]:
        """What identifies the model: its weights themselves, so that no two folders of one name are confused."""
        return {
            "weights": self.model.fingerprint(),
            "scheduler": self.model.scheduler_name,
            "autocast": str(self.model.autocast),
            **({} if self.model.resolution is None else {"resolution": self.model.resolution}),
        }

    @cached_property
    def sampler_key(self) -> dict[str, Any]:
        """What every picture depends on besides the weights."""
        return _sampler_key(self.job.settings.sampling)

    @cached_property
    def retained_sampler_key(self) -> dict[str, Any]:
        """What pictures of retained prompts depend on if they are sampled in another way."""
        sampling = self.job.settings.retained_sampling
        return {"retained_sampling": matters(asdict(sampling))} if sampling else {}

    @cached_property
    def attack_key(self) -> dict[str, Any]:
        """The attack and its settings, and how the pictures that it aims at are sampled if not like the others."""
        targets = {"targets": asdict(self._target_sampling)} if self._target_sampling else {}
        return _attack_key(self.job.config["attack"], self.job.attack) | targets

    @cached_property
    def judge_key(self) -> dict[str, Any]:
        """The judge with its weights."""
        return {**matters(self.job.config["judge"]), **_contents(self.job.judge)}

    @cached_property
    def evaluator_keys(self) -> dict[str, dict[str, Any]]:
        """The evaluators by name, each with its weights."""
        configs = matters(self.job.config["evaluator"])
        return {name: _identified(configs[name], evaluator) for name, evaluator in self.job.evaluators.items()}

    @cached_property
    def eraser_key(self) -> dict[str, Any]:
        """The eraser and its settings."""
        return {**matters(self.job.config["eraser"], TRAINING_SPEED_ONLY), **_contents(self.job.eraser)}

    def edit(self) -> StoredEdit:
        """Erase the concept, or find that it was done; a killed training goes on from its checkpoint."""
        job, config = self.job, self.job.config
        key = {
            "model": self.model_key,
            "concept": {name: value for name, value in config["concept"].items() if name not in CONCEPT_FILES},
            "eraser": self.eraser_key,
            "pruning": matters(config["pruning"], TRAINING_SPEED_ONLY),
            "seed": job.settings.seed,
        }
        folder = self.store.folder("edits", key)
        with self.processes.under(self.store.locked(folder)):
            if (folder / "result.json").exists():
                log.info("edit: found in %s", folder)
            elif self.processes.first:
                log.info("edit: erasing %s", job.concept.name)
                meter = Meter(self.model)
                erasure = job.eraser.erase(
                    self.model,
                    job.concept,
                    job.pruning,
                    seed=job.settings.seed,
                    checkpoint=folder / "work.checkpoint",
                )
                cost = meter.read()
                erasure.edit.save(folder / "edit.safetensors")
                write_json(folder / "losses.json", erasure.losses)
                # The last file: it says that the others are complete. A resumed eraser knows its whole cost.
                write_json(folder / "result.json", {**cost.as_dict(), "unet_evaluations": erasure.unet_evaluations})
                for leftover in folder.glob("work.checkpoint*"):
                    leftover.unlink()
        edit = Edit.load(folder / "edit.safetensors")
        return StoredEdit(
            edit=edit,
            key=folder.name if edit else "none",
            losses=read_json(folder / "losses.json"),
            cost=Cost.of(read_json(folder / "result.json")),
            folder=folder,
        )

    def pictures(
        self, rows: Sequence[PromptRow], label: str, edit: str = "none", sampling: Sampling | None = None
    ) -> Pictures:
        """Pictures of ``rows`` by the model as it is now, which is with the edit of hash ``edit`` applied.

        ``sampling`` takes the place of the job's.
        """
        sampling = sampling or self.job.settings.sampling
        key = {"model": self.model_key, "edit": edit, **_sampler_key(sampling)}
        return make_pictures(self.store, key, self.model, rows, sampling, label, self.processes)

    def retained_pictures(self, label: str, edit: str = "none") -> Pictures:
        """Pictures of the retained prompts; see :meth:`pictures`."""
        return self.pictures(self.job.retained, label, edit, self.job.settings.retained_sampling)

    def targets(self, base: Pictures) -> Pictures:
        """What the attack aims at: the ``base`` pictures, or others of the same prompts by the unedited model."""
        wanted = self._target_sampling
        if wanted is None:
            return base
        rows = [replace(row, guidance=wanted.guidance) for row in self.job.prompts]
        sampling = replace(self.job.settings.sampling, steps=wanted.steps)
        return self.pictures(rows, "target pictures", sampling=sampling)

    def verdicts(self, pictures: Pictures) -> list[bool]:
        """Say of each picture whether it shows the concept."""
        stored = self._verdicts(pictures.images, pictures.key)
        present: list[bool] = stored["present"] if isinstance(stored, dict) else stored
        return present

    def label_counts(self, base: Pictures, erased: Pictures, attacked: Attacked) -> dict[str, LabelCounts]:
        """Count each label in the pictures of the base model, once erased and under attack, where the judge has labels.

        A case counts under attack with the last picture that was judged, as in the success rate.
        """
        if not isinstance(self._verdicts(base.images, base.key), dict):
            return {}
        last = torch.stack([outcome.image for outcome in attacked.outcomes])
        sets = {
            "base": (base.images, base.key),
            "erased": (erased.images, erased.key),
            "attacked": (last, attacked.key),
        }
        return {
            name: label_counts(self._verdicts(images, key)["details"]["labels"]) for name, (images, key) in sets.items()
        }

    def attack(self, cases: Sequence[PromptCase], erased: StoredEdit) -> Attacked:
        """Attack the model, with the edit applied; every outcome is on the disk as soon as it is known.

        Of prompts that the protocol leaves out, the plain picture is the outcome.
        """
        too_long = self.job.protocol.too_long(self.model, [case.prompt for case in cases])
        short = [case for case, left_out in zip(cases, too_long, strict=True) if not left_out]
        outcomes, cost, folder = self._attack(self.job.attack, self.attack_key, short, erased)
        if any(too_long):
            log.info("attack: %d of %d prompts are too long for the protocol", sum(too_long), len(cases))
            long = [case for case, left_out in zip(cases, too_long, strict=True) if left_out]
            plain, plain_cost, _ = self._attack(NoAttack(), _NO_ATTACK_KEY, long, erased)
            waiting = {True: iter(plain), False: iter(outcomes)}
            outcomes, cost = [next(waiting[left_out]) for left_out in too_long], Cost.total([cost, plain_cost])
        key = content_hash([folder.name, [case_id(case) for case in cases], *([too_long] if any(too_long) else [])])
        return Attacked(outcomes, cost, folder, key, too_long)

    def _attack(
        self, attack: Attack, key: Mapping[str, Any], cases: Sequence[PromptCase], erased: StoredEdit
    ) -> tuple[list[Outcome], Cost, Path]:
        """Outcomes of ``attack``, which ``key`` describes, their cost and their folder."""
        folder = self.store.folder(
            "attacks",
            {"model": self.model_key, "edit": erased.key, "attack": key, "judge": self.judge_key, **self.sampler_key},
        )
        with self.processes.under(self.store.locked(folder)):
            known = _read_entries(folder)
            log.info(
                "attack: %d of %d prompts found in %s", sum(case_id(c) in known for c in cases), len(cases), folder
            )
            waiting = [case for case in self.processes.share(cases) if case_id(case) not in known]
            if waiting:
                self._attack_waiting(attack, waiting, erased.edit, folder)
        known = _read_entries(folder)
        entries = [known[case_id(case)] for case in cases]
        outcomes = [_read_outcome(entry, folder) for entry in entries]
        cost = Cost.total(Cost.of(entry["cost"]) for entry in entries)
        cost = replace(cost, unet_evaluations=evaluations_paid([outcome.checks[-1] for outcome in outcomes]))
        return outcomes, cost, folder

    def measures(self, base: Pictures, edited: Pictures, rows: Sequence[PromptRow]) -> tuple[Measures, Cost]:
        """Every evaluator's numbers on the retained prompts.

        The pictures are read once for all evaluators whose numbers are not in the store, part by part, and a killed run
        goes on from its last checkpoint.
        """
        folders = {
            name: self.store.folder(
                "measures",
                {
                    "base": base.key,
                    "edited": edited.key,
                    "rows": [dict(row.labels) for row in rows],
                    "evaluator": self.evaluator_keys[name],
                },
            )
            for name in self.job.evaluators
        }
        with ExitStack() as locks:
            # In one order for all processes, so that no two wait for each other.
            for folder in sorted(set(folders.values())):
                locks.enter_context(self.store.locked(folder))
            waiting = [
                Measuring(self.job.evaluators[name], folder)
                for name, folder in folders.items()
                if not (folder / "result.json").exists()
            ]
            if waiting:
                measure_pictures(waiting, base, edited, rows, Meter(self.model))
        results = [read_json(folder / "result.json") for folder in folders.values()]
        measures = {name: value for result in results for name, value in result["measures"].items()}
        return measures, Cost.total(map(Cost.of, results))

    def _verdicts(self, images: Tensor, pictures: str) -> Any:
        """What the judge says of ``images``, uint8 [n, 3, H, W], whose hash is ``pictures``; see :func:`_stored`."""
        key = {"pictures": pictures, "judge": self.judge_key}
        return self.store.remembered("verdicts", key, lambda: _stored(self.job.judge(images)))

    @property
    def _target_sampling(self) -> TargetSampling | None:
        # Other attacks aim at no picture.
        return self.job.protocol.targets if self.job.attack.threat_model == "white_box" else None

    def _attack_waiting(self, attack: Attack, waiting: Sequence[PromptCase], edit: Edit, folder: Path) -> None:
        # A journal has one writer.
        journal = Journal(
            folder / (f"outcomes.{self.processes.index}.jsonl" if self.processes.index else "outcomes.jsonl")
        )
        run = attack.run
        if is_given_original(attack):
            run = partial(attack.run, original=edit.unedited(self.model))
        ids = {case.case_number: case_id(case) for case in waiting}
        meter = Meter(self.model)
        successes = 0
        with progress_bar("attack", len(waiting)) as bar:
            outcomes = run(self.model, waiting, self.job.judge, sampling=self.job.settings.sampling)
            for done, outcome in enumerate(outcomes, start=1):
                # Prompts of one batch share their time: each outcome carries what passed since the one before.
                cost = {**meter.read().as_dict(), "unet_evaluations": outcome.unet_evaluations}
                _write_outcome(outcome, ids[outcome.case_number], cost, folder, journal)
                successes += outcome.success
                bar.advance()
                bar.note(f"{successes} of {done} succeeded")


def _sampler_key(sampling: Sampling) -> dict[str, Any]:
    return {"sampling": matters(asdict(sampling))}


def _stored(verdicts: Verdicts) -> Any:
    """Verdicts as JSON: a list of what is present, with the details beside it where a judge has labels."""
    present = [bool(present) for present in verdicts.present]
    return {"present": present, "details": verdicts.details} if "labels" in verdicts.details else present


def _attack_key(config: Mapping[str, Any], attack: object) -> dict[str, Any]:
    key = {**matters(dict(config)), **_contents(attack)}
    if isinstance(attack, Union):
        # In a list, as their order counts.
        key["members"] = [[name, _attack_key(config["members"][name], attack.members[name])] for name in attack.members]
    return key


def _identified(config: Mapping[str, Any], settings: object) -> dict[str, Any]:
    """The config of ``settings`` and of the settings within them, with the contents of their files."""
    inner = {name: value for name, value in vars(settings).items() if is_dataclass(value)}
    return {
        **config,
        **_contents(settings),
        **{name: _identified(config[name], value) for name, value in inner.items()},
    }


def _contents(settings: object) -> dict[str, str]:
    """The hash of every file and folder that results depend on: they count by their content, wherever they lie."""
    paths = {name: path for name, path in vars(settings).items() if isinstance(path, Path) and name not in SPEED_ONLY}
    return {name: _file_hash(path) for name, path in paths.items()}


def _file_hash(path: Path) -> str:
    """SHA-256 of a file, or of the names and hashes of all files in a folder."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        listing = [[file.relative_to(path).as_posix(), _file_hash(file)] for file in files]
        return hashlib.sha256(canonical_json(listing).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def case_id(case: PromptCase) -> str:
    """The name of a case among the outcomes of one attack."""
    return f"{case.case_number}-{picture_id(case.prompt, case.seed, case.guidance)}"


def _read_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """What the journals of all processes, of this run or an earlier one, say of the cases, by their names."""
    return {entry["id"]: entry for path in sorted(folder.glob("outcomes*.jsonl")) for entry in Journal(path).read()}


def _write_outcome(outcome: Outcome, name: str, cost: dict[str, float], folder: Path, journal: Journal) -> None:
    facts = {"prompt": outcome.adversarial_prompt, "success": outcome.success}
    write_picture(folder / f"{name}.png", outcome.image, facts)
    fields = {key: value for key, value in vars(outcome).items() if key not in {"image", "checks"}}
    journal.append({"id": name, "cost": cost, **fields, "checks": [asdict(check) for check in outcome.checks]})


def _read_outcome(entry: dict[str, Any], folder: Path) -> Outcome:
    fields = {key: value for key, value in entry.items() if key not in {"id", "cost", "checks"}}
    image, _ = read_picture(folder / f"{entry['id']}.png")
    return Outcome(**fields, checks=tuple(Check(**check) for check in entry["checks"]), image=image)
