"""The stages of a job: each is looked up in the store, and worked on only where it is not complete."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attacks.cases import Outcome, PromptCase, evaluations_paid
from attacks.none import NoAttack
from attacks.protocols import Attack, is_given_original, one_for_each
from diffusion.identity import identity
from diffusion.model import TextToImage
from diffusion.progress import progress_bar
from diffusion.sampling import Sampling
from erasure.edit import Edit
from erasure.protocols import Erasure
from evaluation.prompt_sets import PromptRow
from evaluation.quality import Measures
from evaluation.verdicts import Judge, LabelCounts, Verdicts, label_counts
from experiments.job.cost import Cost, Meter
from experiments.job.journal import Journal
from experiments.job.keys import identified, sampler_key
from experiments.job.made import EDIT, Attacked, StoredEdit, read_edit
from experiments.job.measuring import Measuring, measure_pictures
from experiments.job.new_seeds import by_text, found_texts, holding, rows_of, second_opinion
from experiments.job.outcomes import case_id, look_at_outcomes, read_entries, read_outcome, write_outcome
from experiments.job.pictures import Pictures, make_pictures, pixel_hash
from experiments.job.processes import ALONE, Processes
from experiments.job.protocol import TargetSampling
from experiments.job.settings import TRAINING_SPEED_ONLY, Job, matters
from experiments.job.store import RESULT, Store, content_hash

log = logging.getLogger(__name__)

CONCEPT_FILES = frozenset({"prompts", "retained_prompts", "pairs"})
"""Fields of a concept that no eraser reads."""

ATTACK = "attack"
"""What the progress of an attack over its prompts is called."""

_NO_ATTACK = {"_target_": "attacks.none.NoAttack"}
"""The config of ``attack=none``, whose outcomes are those of prompts that are not attacked."""


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
        """What identifies the model, by the content of all that it is, so that no two of one name are confused."""
        return identity(self.model)

    @cached_property
    def sampler_key(self) -> dict[str, Any]:
        """What every picture depends on besides the model."""
        return sampler_key(self.job.settings.sampling)

    @cached_property
    def retained_sampler_key(self) -> dict[str, Any]:
        """What pictures of retained prompts depend on if they are sampled in another way."""
        sampling = self.job.settings.retained_sampling
        return {"retained_sampling": matters(asdict(sampling))} if sampling else {}

    @cached_property
    def attack_key(self) -> dict[str, Any]:
        """The attack and its settings, and how the pictures that it aims at are sampled if not like the others."""
        targets = {"targets": asdict(self._target_sampling)} if self._target_sampling else {}
        return identified(self.job.config["attack"], self.job.attack) | targets

    @cached_property
    def judge_key(self) -> dict[str, Any]:
        """The judge with its weights."""
        return identified(self.job.config["judge"], self.job.judge)

    @cached_property
    def evaluator_keys(self) -> dict[str, dict[str, Any]]:
        """The evaluators by name, each with its weights."""
        configs = self.job.config["evaluator"]
        return {name: identified(configs[name], evaluator) for name, evaluator in self.job.evaluators.items()}

    @cached_property
    def transfer_key(self) -> dict[str, Any]:
        """How found texts are tried once more, with the second judge's weights; nothing if they are not."""
        transfer = self.job.transfer
        if not transfer.seeds and transfer.judge is None:
            return {}
        judge = transfer.judge and identified(self.job.config["transfer"]["judge"], transfer.judge)
        return {"transfer": {"seeds": transfer.seeds, "judge": judge}}

    @cached_property
    def eraser_key(self) -> dict[str, Any]:
        """The eraser and its settings."""
        return identified(self.job.config["eraser"], self.job.eraser, TRAINING_SPEED_ONLY)

    @cached_property
    def pruning_key(self) -> dict[str, Any]:
        """The pruning and its settings."""
        return identified(self.job.config["pruning"], self.job.pruning, TRAINING_SPEED_ONLY)

    def edit(self) -> StoredEdit:
        """Erase the concept, or find that it was done; a killed training goes on from its checkpoint."""
        job, config = self.job, self.job.config
        key = {
            "model": self.model_key,
            "concept": {name: value for name, value in config["concept"].items() if name not in CONCEPT_FILES},
            "eraser": self.eraser_key,
            "pruning": self.pruning_key,
            "seed": job.settings.seed,
        }
        folder = self.store.folder("edits", key)
        found: list[StoredEdit] = []

        def look() -> None:
            if self.store.renews(folder):
                self._forget_edit(folder)
            if (stored := read_edit(self.store, folder)) is not None:
                found.append(stored)

        with self.processes.under(self.store.locked(folder, look)):
            if found:
                log.info("edit: found in %s", folder)
            elif self.processes.first:
                log.info("edit: erasing %s", job.concept.name)
                self._erase(folder)
        edit = found[0] if found else read_edit(self.store, folder)
        if edit is None:
            raise ValueError(f"The edit in {folder} was damaged as soon as it was written; check the disk.")
        return edit

    def _erase(self, folder: Path) -> None:
        job = self.job
        eraser = job.eraser
        if self.store.fresh and getattr(eraser, "cache", None) is not None:
            eraser = replace(eraser, cache=None)  # type: ignore[type-var]
        meter = Meter(self.model)
        erasure = eraser.erase(
            self.model, job.concept, job.pruning, seed=job.settings.seed, checkpoint=folder / "work.checkpoint"
        )
        cost = meter.read()
        if not isinstance(erasure, Erasure):
            raise ValueError(
                f"{type(eraser).__module__}.{type(eraser).__name__}.erase returned {type(erasure).__name__}; it must "
                "return an erasure.protocols.Erasure."
            )
        erasure.edit.save(folder / EDIT)
        # The last file: it says that the other is complete. A resumed eraser knows its whole cost.
        self.store.write_result(
            folder,
            {
                "edit": erasure.edit.fingerprint(),
                "losses": erasure.losses,
                **cost.as_dict(),
                "unet_evaluations": erasure.unet_evaluations,
            },
        )
        for leftover in folder.glob("work.checkpoint*"):
            leftover.unlink()

    @staticmethod
    def _forget_edit(folder: Path) -> None:
        for name in (RESULT, EDIT, "work.checkpoint*"):
            for path in folder.glob(name):
                path.unlink()

    def pictures(
        self, rows: Sequence[PromptRow], label: str, edit: str = "none", sampling: Sampling | None = None
    ) -> Pictures:
        """Pictures of ``rows`` by the model as it is now, which is with the edit of hash ``edit`` applied.

        ``sampling`` takes the place of the job's.
        """
        sampling = sampling or self.job.settings.sampling
        key = {"model": self.model_key, "edit": edit, **sampler_key(sampling)}
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
        found = self._attack(self.job.attack, self.attack_key, short, erased)
        outcomes, cost, origins = found.outcomes, found.cost, found.origins
        if any(too_long):
            log.info("attack: %d of %d prompts are too long for the protocol", sum(too_long), len(cases))
            long = [case for case, left_out in zip(cases, too_long, strict=True) if left_out]
            plain = self._attack(NoAttack(), identified(_NO_ATTACK, NoAttack()), long, erased)
            waiting = {True: iter(plain.outcomes), False: iter(outcomes)}
            outcomes = [next(waiting[left_out]) for left_out in too_long]
            cost, origins = Cost.total([cost, plain.cost]), sorted({*origins, *plain.origins})
        shown = [pixel_hash(outcome.image) for outcome in outcomes]
        key = content_hash([found.folder.name, [case_id(case) for case in cases], too_long, shown])
        return Attacked(outcomes, cost, found.folder, key, too_long, origins)

    def _attack(
        self, attack: Attack, key: Mapping[str, Any], cases: Sequence[PromptCase], erased: StoredEdit
    ) -> Attacked:
        """Outcomes of ``attack``, which ``key`` describes."""
        folder = self.store.folder(
            "attacks",
            {"model": self.model_key, "edit": erased.key, "attack": key, "judge": self.judge_key, **self.sampler_key},
        )
        names = [case_id(case) for case in cases]
        with self.processes.under(self.store.locked(folder, partial(look_at_outcomes, self.store, folder, names))):
            known = read_entries(folder)
            log.info("attack: %d of %d prompts found in %s", sum(name in known for name in names), len(cases), folder)
            waiting = [case for case in self.processes.share(cases) if case_id(case) not in known]
            if waiting:
                self._attack_waiting(attack, waiting, erased.edit, folder)
        known = read_entries(folder)
        entries = [known[name] for name in names]
        outcomes = [read_outcome(entry, folder) for entry in entries]
        cost = Cost.total(Cost.of(entry["cost"]) for entry in entries)
        cost = replace(cost, unet_evaluations=evaluations_paid([outcome.checks[-1] for outcome in outcomes]))
        origins = sorted({entry["origin"] for entry in entries})
        return Attacked(outcomes, cost, folder, "", [False] * len(cases), origins)

    def found_on_new_seeds(
        self, outcomes: Sequence[Outcome], cases: Sequence[PromptCase], edit: str
    ) -> Pictures | None:
        """Pictures of the texts that an attack found, each with its new seeds; None if there are no such.

        The edit of hash ``edit`` is applied.
        """
        guidance = {case.case_number: case.guidance for case in cases}
        found = found_texts(outcomes)
        rows = rows_of(found, [guidance[outcome.case_number] for outcome in found], self.job.transfer.seeds)
        return self.pictures(rows, "found texts with new seeds", edit) if rows else None

    def holding(self, attacked: Attacked, pictures: Pictures | None) -> dict[str, Any]:
        """What a summary says of whether found texts hold; ``pictures`` are those of their new seeds."""
        seeds, second = self.job.transfer.seeds, self.job.transfer.judge
        if not self.transfer_key:
            return {}
        found = found_texts(attacked.outcomes)
        shown = by_text(self.verdicts(pictures), seeds) if pictures else [[]] * len(found)
        successes = sum(outcome.success and not outcome.plain_success for outcome in attacked.outcomes)
        result = holding(seeds, successes, shown)
        if second is not None:
            images = torch.stack([outcome.image for outcome in found]) if found else None
            seen = self.verdicts_on(images, f"{attacked.key} found", second) if images is not None else []
            again = self.verdicts_on(pictures.images, pictures.key, second) if pictures else []
            result["second_judge"] = second_opinion(seen, by_text(again, seeds) if pictures else [])
        return result

    def verdicts_on(self, images: Tensor, pictures: str, judge: Judge) -> list[bool]:
        """What the second ``judge`` says of ``images``, uint8 [n, 3, H, W], whose hash is ``pictures``."""
        key = {"pictures": pictures, "judge": self.transfer_key["transfer"]["judge"]}
        return self.store.remembered("verdicts", key, lambda: [bool(there) for there in judge(images).present])  # type: ignore[no-any-return]

    def measures(self, base: Pictures, edited: Pictures, rows: Sequence[PromptRow]) -> tuple[Measures, Cost, list[str]]:
        """Every evaluator's numbers on the retained prompts, what they cost and who measured them.

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
            missing = [name for name, folder in folders.items() if self.store.result(folder) is None]
            waiting = [Measuring(self.job.evaluators[name], self.store, folders[name]) for name in missing]
            if waiting:
                measure_pictures(waiting, base, edited, rows, Meter(self.model))
            results = [result for folder in folders.values() if (result := self.store.result(folder)) is not None]
        measures = {name: value for result in results for name, value in result.value["measures"].items()}
        costs = [Cost.of(result.value) for result in results]
        return measures, Cost.total(costs), sorted({result.origin for result in results})

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
        run, models = attack.run, [self.model]
        if is_given_original(attack):
            models.append(edit.unedited(self.model))
            run = partial(attack.run, original=models[-1])
        ids = {case.case_number: case_id(case) for case in waiting}
        meter = Meter(*models)
        successes = 0
        with progress_bar(ATTACK, len(waiting)) as bar:
            outcomes = run(self.model, waiting, self.job.judge, sampling=self.job.settings.sampling)
            for done, outcome in enumerate(one_for_each(outcomes, waiting, attack), start=1):
                # Prompts of one batch share their time: each outcome carries what passed since the one before.
                cost = {**meter.read().as_dict(), "unet_evaluations": outcome.unet_evaluations}
                name = ids[outcome.case_number]
                write_outcome(outcome, name, cost, folder, journal, self.store.origin)
                successes += outcome.success
                bar.advance()
                bar.note(f"{successes} of {done} succeeded", successes / done)


def _stored(verdicts: Verdicts) -> Any:
    """Verdicts as JSON: a list of what is present, with the details beside it where a judge has labels."""
    present = [bool(present) for present in verdicts.present]
    return {"present": present, "details": verdicts.details} if "labels" in verdicts.details else present
