"""What every check of a new method stands on: a small job on the tiny model, and who is to blame for what."""

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor

from diffusion.checked import checked
from evaluation.verdicts import Verdicts
from experiments.command.composing import compose_job
from experiments.command.config import build
from experiments.command.errors import CommandError, explain
from experiments.command.kinds import told_with_line, where
from experiments.job.job import run_job
from experiments.job.settings import Job
from experiments.job.store import read_json

SMALL: Mapping[str, int] = {
    **dict.fromkeys(("steps", "epochs", "iterations", "rounds", "tries", "generations"), 4),
    **dict.fromkeys(("timesteps", "steps_per_timestep", "sampling_steps", "finetune_steps", "inner_steps"), 2),
    **dict.fromkeys(("images", "pictures", "trajectories", "retain_trajectories", "population"), 8),
    **dict.fromkeys(("batch_size", "sampling_batch_size"), 8),
}
"""Fields whose larger values are brought down to these, so that a check takes seconds."""

_JOB = (
    *("model=tiny", "evaluator=none", "tracker=off", "transfer.seeds=0"),
    *("prompts=3", "retained=2", "sampling.steps=2", "sampling.batch_size=2"),
)
_TRIAL_JUDGE = ("~judge", f"+judge._target_={__name__}.EveryThird")
_TRIED_WITH: Mapping[str, tuple[str, ...]] = {
    "eraser": ("pruning=off", "attack=none", *_TRIAL_JUDGE),
    "pruning": ("eraser=esd", "attack=none", *_TRIAL_JUDGE),
    "attack": ("eraser=none", "pruning=off", "model.precision=fp64", *_TRIAL_JUDGE),
    "judge": ("eraser=none", "pruning=off", "attack=none"),
}


@checked
class EveryThird:
    """A judge that says of one picture in three, by the sum of its pixels, that it shows the concept."""

    def __call__(self, images: Tensor) -> Verdicts:
        """Judge uint8 pictures [n, 3, H, W]."""
        sums = images.long().sum(dim=(1, 2, 3))
        return Verdicts(sums % 3 == 1, (sums % 101) / 100)


@dataclass(frozen=True)
class Trial:
    """A method and the small job that it is tried in.

    Attributes:
        kind: ``eraser``, ``pruning``, ``attack`` or ``judge``.
        job: The job, whose settings are brought down.
        reduced: Which fields were, with their values.
    """

    kind: str
    job: Job
    reduced: Mapping[str, int]

    @classmethod
    def of(cls, kind: str, choice: str, store: Path, *overrides: str) -> "Trial":
        """Compose and make the job; ``overrides`` come last.

        Raises:
            CommandError: The YAML file or the class is wrong.
        """
        asked = [*_JOB, *_TRIED_WITH[kind], f"{kind}={choice}", f"store={store}", *overrides]
        config, choices = compose_job(asked)
        reduced = {key: value for each in ("eraser", "pruning", "attack") for key, value in _reduce(config, each)}
        own = {key: value for key, value in reduced.items() if key.startswith(f"{kind}.")}
        return cls(kind, build(config, choices), own)

    @property
    def method(self) -> Any:
        """The object itself."""
        return getattr(self.job, self.kind)

    @property
    def named(self) -> str:
        """The class with its file and line."""
        return where(type(self.method))

    def run(self, folder: Path) -> list[Mapping[str, Any]]:
        """Run the whole job; what its summary says of every prompt."""
        folder.mkdir(parents=True, exist_ok=True)
        with quiet(), blamed(f"A job with {self.kind} {self.named}"):
            cases: list[Mapping[str, Any]] = read_json(run_job(self.job, folder, lambda _: None))["cases"]
        return cases


def require(condition: object, sentence: str) -> None:
    """Refuse a method.

    Raises:
        CommandError: The condition does not hold; its text is ``sentence``.
    """
    if not condition:
        raise CommandError(sentence)


def require_signature(trial: Trial, name: str, *given: str, **named: None) -> None:
    """See to it that the method's function ``name`` can be called as the protocol has it.

    Raises:
        CommandError: It takes other arguments.
    """
    function = getattr(trial.method, name)
    try:
        inspect.signature(function).bind(*given, **named)
    except TypeError as error:
        wanted = ", ".join([*given, *(["*"] if named else []), *named])
        raise CommandError(
            f"{trial.named}: {name} takes {inspect.signature(function)}; it must take ({wanted}): {error}."
        ) from error


@contextmanager
def blamed(doing: str) -> Iterator[None]:
    """Say in one sentence what fails, and in which line.

    Raises:
        CommandError: Something failed.
    """
    try:
        yield
    except CommandError:
        raise
    except Exception as error:
        sentence = explain(error) or told_with_line(error)
        raise CommandError(f"{doing} fails on the tiny model: {sentence}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Log errors alone."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _reduce(config: DictConfig, place: str) -> Iterator[tuple[str, int]]:
    node = OmegaConf.select(config, place)
    if not isinstance(node, DictConfig):
        return
    for key in list(node):
        field = f"{place}.{key}"
        if OmegaConf.is_missing(node, key) or key == "presets":
            continue
        value = node[key]
        if isinstance(value, DictConfig):
            yield from _reduce(config, field)
        elif key in SMALL and isinstance(value, int) and value > SMALL[str(key)]:
            with open_dict(config):
                OmegaConf.update(config, field, SMALL[str(key)])
            yield field, SMALL[str(key)]
