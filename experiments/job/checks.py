"""What can only be known with the model at hand, checked before the first training step."""

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from attacks.cases import PromptCase
from attacks.protocols import Attack, is_given_original
from attacks.union import Union
from diffusion.model import TextToImage
from diffusion.streams import stream
from evaluation.quality import ReadsLabels
from experiments.job.prompts import job_prompts
from experiments.job.remote import Remote
from experiments.job.remote_store import local_copy
from experiments.job.settings import Job, matters
from experiments.job.store import canonical_json

log = logging.getLogger(__name__)

_PNG_SHARE = 0.6
"""Of a picture's raw bytes, what a PNG of a photograph takes."""

_SMALLEST_FILE = 4096
"""Bytes that a file takes however short it is."""

_STATES = 4
"""Tensors for each trained weight: itself and two moments in a training's checkpoint, and its new value in the edit."""


def check_jobs(
    jobs: Sequence[Job], told: Callable[[int], AbstractContextManager[None]] = lambda _: nullcontext()
) -> None:
    """Check the jobs of a sweep, with every model that they need, which is loaded once.

    Args:
        jobs: What is to be done.
        told: Entered around the checks of each job, by its number from 1: says which one an error belongs to.

    Raises:
        ValueError: A job could not be finished.
        OSError: A file is missing, or the store cannot be written to.
    """
    by_model: dict[str, list[tuple[int, Job]]] = {}
    for number, job in enumerate(jobs, start=1):
        by_model.setdefault(canonical_json(matters(job.config["model"])), []).append((number, job))
    needed: dict[Path | Remote, int] = {}
    for same in by_model.values():
        number, job = same[0]
        with told(number):
            model = job.model.load()
        known: set[str] = set()
        for number, job in same:
            with told(number):
                check_loaded(job, model, known)
            needed[job.settings.store] = needed.get(job.settings.store, 0) + most_bytes(job, model)
    for store, size in needed.items():
        check_room(store, size)


def check_job(job: Job, model: TextToImage) -> None:
    """Check one job, and the disk; see :func:`check_jobs`."""
    check_loaded(job, model, set())
    check_room(job.settings.store, most_bytes(job, model))


def check_loaded(job: Job, model: TextToImage, known: set[str]) -> None:
    """Let the judge, the evaluators and the attack say whether they can do this job.

    Args:
        job: What is to be done.
        model: Its model, unedited.
        known: What was found to be in order before; it grows.

    Raises:
        ValueError: Something does not fit: prompts to the model, labels to an evaluator, the attack to the model.
        OSError: A file is missing.
    """
    job_prompts(job, model)
    noise = stream(0, "checks/picture")
    picture = torch.randint(256, (1, 3, *model.image_size), generator=noise, dtype=torch.uint8)
    config = job.config
    if _is_new("judge", [config["judge"], picture.shape], known):
        with _told_of("judge"):
            job.judge(picture)
    retained = [[row.case_number, row.prompt, dict(row.labels)] for row in job.retained]
    for name, evaluator in job.evaluators.items():
        if _is_new("evaluator", [config["evaluator"][name], picture.shape, retained], known):
            with _told_of(f"evaluator.{name}"):
                if isinstance(evaluator, ReadsLabels):
                    evaluator.check_labels(job.retained)
                evaluator.start().update(picture, picture, job.retained[:1])
    prompts = [[row.case_number, row.prompt] for row in job.prompts]
    if _is_new("attack", [config["attack"], config["protocol"], prompts], known):
        too_long = job.protocol.too_long(model, [row.prompt for row in job.prompts])
        cases = [
            PromptCase(row.case_number, row.prompt, row.seed, row.guidance, picture[0])
            for row, left_out in zip(job.prompts, too_long, strict=True)
            if not left_out
        ]
        with _silenced("attacks"), _told_of("attack"):
            check_attack(job.attack, model, cases, job)


def check_attack(attack: Attack, model: TextToImage, cases: Sequence[PromptCase], job: Job) -> None:
    """Call an attack, which refuses at once what it cannot do, and do not ask it for an outcome.

    Raises:
        ValueError: It refuses the model or the cases.
    """
    if isinstance(attack, Union):
        for member in attack.members.values():
            check_attack(member, model, cases, job)
        return
    run = partial(attack.run, original=model) if is_given_original(attack) else attack.run
    run(model, cases, job.judge, sampling=job.settings.sampling)


def check_room(store: Path | Remote, needed: int) -> None:
    """Write a small file into the store, and warn where its disk may be too small.

    Args:
        store: Folder of the artefacts, which is made if need be; or where they lie, with a copy on this machine.
        needed: Bytes, at most.

    Raises:
        OSError: Nothing can be written there.
    """
    if isinstance(store, Remote):
        store.check()
        store = local_copy(store)
    try:
        store.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=store) as file:
            file.write(bytes(_SMALLEST_FILE))
    except OSError as error:
        raise OSError(
            f"The store {store} cannot be written to: {error.strerror or error}; choose another, as in store=FOLDER."
        ) from error
    free = shutil.disk_usage(store).free
    if free < needed:
        log.warning(
            "the store %s has %.1f GiB of free space, and %.1f GiB may be needed", store, free / 2**30, needed / 2**30
        )


def most_bytes(job: Job, model: TextToImage) -> int:
    """About the most that a job adds to the store: a picture of each prompt and model, a checkpoint and the edit."""
    height, width = model.image_size
    picture = max(_SMALLEST_FILE, round(_PNG_SHARE * 3 * height * width))
    # By the base model and the edited one, and the attack's last one; the attack may aim at others.
    pictures = 4 * len(job.prompts) + 2 * len(job.retained)
    weights: int = sum(weight.numel() * weight.element_size() for weight in model.network.parameters())
    return pictures * picture + _STATES * weights


def _is_new(kind: str, facts: Any, known: set[str]) -> bool:
    """Whether something is checked for the first time, which is remembered."""
    key = canonical_json([kind, facts])
    if key in known:
        return False
    known.add(key)
    return True


@contextmanager
def _told_of(field: str) -> Iterator[None]:
    """Put the name of the config's field before what is wrong with it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error
    except FileNotFoundError as error:
        if error.filename is not None:
            raise
        raise FileNotFoundError(f"{field}: {error}") from error


@contextmanager
def _silenced(name: str) -> Iterator[None]:
    """Keep what a room logs to itself: it speaks of a run that does not take place."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
