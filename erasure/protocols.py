"""How erasing and pruning fit together."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from torch import Tensor

from diffusion.model import TextToImage
from erasure.concept import Concept
from erasure.edit import Edit
from erasure.parameters import UNetScope


@dataclass(frozen=True)
class Erasure:
    """An edit and how it came about.

    Attributes:
        edit: What to change in the model.
        losses: The objective at every optimiser step; empty for methods that do not train.
        unet_evaluations: Samples that went through the U-Net, those of an interrupted and resumed run included.
    """

    edit: Edit
    losses: list[float]
    unet_evaluations: int


class Objective(Protocol):
    """What an eraser minimises; weights can be trained on it, or a mask over them."""

    def prepare(
        self, model: TextToImage, concept: Concept, *, scope: UNetScope, steps: int, seed: int, checkpoint: Path | None
    ) -> int:
        """Compute what needs the unedited model: text embeddings, trajectories, frozen predictions.

        Args:
            model: The unedited model.
            concept: What is to be erased.
            scope: The parameters that will change.
            steps: How many steps ``loss`` will be asked for.
            seed: Of everything random.
            checkpoint: Finished parts are kept in files whose names start with this one, and found again.

        Returns:
            U-Net evaluations spent, by an interrupted run as well.
        """

    def loss(self, model: TextToImage, step: int) -> Tensor:
        """The scalar loss of ``step``, differentiable in the model's weights of the scope."""


class Pruning(Protocol):
    """A strategy that sets weights to zero."""

    needs_objective: ClassVar[bool]
    """It optimises the eraser's objective in place of the weights; otherwise it acts on the erased model."""

    def prune(
        self,
        model: TextToImage,
        concept: Concept,
        objective: Objective | None,
        *,
        scope: UNetScope,
        seed: int,
        checkpoint: Path | None,
    ) -> Erasure:
        """Choose the weights to prune and leave ``model`` as it was.

        Args:
            model: The unedited model if an objective is needed, else the erased one.
            concept: What is to be erased.
            objective: The eraser's, not yet prepared.
            scope: The eraser's scope, for a strategy that names none.
            seed: Of everything random.
            checkpoint: A killed run continues from files whose names start with this one.
        """


class Eraser(Protocol):
    """A method that removes a concept from a model."""

    has_objective: ClassVar[bool]
    """It minimises an :class:`Objective`, which learned pruning needs."""

    def erase(
        self, model: TextToImage, concept: Concept, pruning: Pruning, *, seed: int, checkpoint: Path | None = None
    ) -> Erasure:
        """Make the edit that erases ``concept``; ``model`` is left as it was.

        Args:
            model: The model to erase from.
            concept: What to erase.
            pruning: How weights are set to zero, if at all.
            seed: Of everything random.
            checkpoint: A killed run continues from files whose names start with this one.
        """


def check_pair(eraser: Eraser | type[Eraser], pruning: Pruning | type[Pruning]) -> None:
    """Refuse a pruning strategy that learns under an objective together with an eraser that has none.

    Raises:
        ValueError: The pair makes no sense.
    """
    if pruning.needs_objective and not eraser.has_objective:
        names = [(part if isinstance(part, type) else type(part)).__name__ for part in (pruning, eraser)]
        raise ValueError(
            f"Pruning {names[0]!r} learns under the eraser's objective and eraser {names[1]!r} has none; "
            "choose one that trains (eraser=esd, ac, fmn, salun, advunlearn, stereo) or a pruning that scores weights "
            "(conceptprune, ...)."
        )
