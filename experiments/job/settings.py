"""What a job is asked to do: plain settings and checked objects."""

import dataclasses
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import BeforeValidator, Field, field_validator

from attacks.protocols import Attack
from diffusion.checked import checked
from diffusion.loading import ModelSource
from diffusion.sampling import Sampling
from erasure.concept import Concept
from erasure.protocols import Eraser, Pruning
from evaluation.prompt_sets import LARGEST_SEED, PromptRow
from evaluation.quality import Evaluator
from evaluation.verdicts import Judge
from experiments.job.new_seeds import NewSeeds
from experiments.job.protocol import Protocol as EvaluationProtocol
from experiments.job.recording import Recorder
from experiments.job.remote import Remote, place_of

SPEED_ONLY = frozenset(
    {
        *("batch_size", "sampling_batch_size", "forward_batch_size", "device", "cache", "processes"),
        *("gradient_checkpointing", "offload", "build", "other_sizes"),
    }
)
"""Fields that change how fast numbers come, whether they come at all, or say where files lie that count by their
content, never the numbers: no hash has them."""

TRAINING_SPEED_ONLY = SPEED_ONLY - {"batch_size", "sampling_batch_size", "forward_batch_size"}
"""The same for erasers and pruning, whose ``batch_size`` is that of the training.

How many pictures are computed at a time changes their last digits. A picture hides that; a training makes it large.
"""


Floor = Literal["auto", "on", "off", "output_zero", "random_weights", "foreign_prompt"]
"""What a job's success is compared with; see :attr:`Settings.floor`."""


def _switch(value: Any) -> Any:
    # YAML 1.1 reads on and off as truth values.
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


@checked
class Settings:
    """What a job needs besides its objects.

    Attributes:
        seed: Seed of the eraser and of the attack; pictures have their own in the prompt sets.
        prompts: How many of the concept's prompts are attacked, from the first.
        retained: How many of the retained prompts are measured, from the first.
        sampling: How pictures are sampled.
        store: Folder of the artefacts, or where they lie on object storage.
        retained_sampling: How those of the retained prompts are sampled, if not like the others.
        dry_run: Tell what would be done, and do nothing.
        floor: Whether the attack is run on the model that never knew the concept and on the unedited one too; ``auto``:
            where there is such a model, and an attack. Or the control that takes the place of the model that never
            knew, for models that have none; see :data:`experiments.job.floors.CONTROLS`.
        processes: How many processes share the prompts, each on a GPU of its own if there are GPUs.
        threads: How many CPU threads PyTorch computes with; None for one where the model is small and on the CPU, else
            as many as PyTorch takes. Other numbers of threads sum in another order and train other weights, so
            artefacts of each are kept apart.
        fresh: Whether everything is made anew that the store has already.
    """

    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)]
    prompts: Annotated[int, Field(ge=1)]
    retained: Annotated[int, Field(ge=2)]
    sampling: Sampling
    store: Path | Remote
    retained_sampling: Sampling | None = None
    processes: Annotated[int, Field(ge=1)] = 1
    threads: Annotated[int, Field(ge=1)] | None = None
    fresh: bool = False
    dry_run: bool = False
    floor: Annotated[Floor, BeforeValidator(_switch)] = "auto"

    @field_validator("store", mode="before")
    @classmethod
    def _is_a_place(cls, store: object) -> object:
        return place_of(store) if isinstance(store, str) else store


class Tracker(Protocol):
    """Where a job's record goes."""

    @contextmanager
    def start(self, job: "Job", folder: Path) -> Iterator[Recorder]:
        """Record one job; ``folder`` is the run's own."""


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything one command asks for, checked.

    Attributes:
        settings: Plain values.
        prompts: What asks for the concept, and is attacked.
        retained: What must keep working.
        config: The whole config, resolved, as plain data.
        choices: Which file each group took, for names in tables (``eraser: esd``).
    """

    model: ModelSource
    concept: Concept
    judge: Judge
    eraser: Eraser
    pruning: Pruning
    attack: Attack
    evaluators: Mapping[str, Evaluator]
    tracker: Tracker
    protocol: EvaluationProtocol
    transfer: NewSeeds
    settings: Settings
    prompts: list[PromptRow]
    retained: list[PromptRow]
    config: dict[str, Any]
    choices: dict[str, str]


def matters(config: Any, speed_only: Set[str] = SPEED_ONLY) -> Any:
    """``config`` without the fields that change speed alone.

    >>> matters({"steps": 5, "inner": [{"batch_size": 2, "k": 1}]})
    {'steps': 5, 'inner': [{'k': 1}]}
    """
    if isinstance(config, dict):
        return {key: matters(value, speed_only) for key, value in config.items() if key not in speed_only}
    if isinstance(config, list):
        return [matters(value, speed_only) for value in config]
    return config
