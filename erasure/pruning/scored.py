"""What strategies share that score the weights of a scope by a formula and prune some of them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from pydantic import Field
from torch import nn

from diffusion.checked import checked
from diffusion.model import TextToImage
from erasure.concept import Concept
from erasure.entries import Fill
from erasure.parameters import UNetScope
from erasure.protocols import Erasure, Objective
from erasure.pruning.masks import Masks, Sparsity, maskable_parameters, pruned_by

Weights = Mapping[str, nn.Parameter]
"""Parameters of a model by name."""


@checked
class Scored(ABC):
    """A strategy that needs no objective: it scores weights and prunes those that score lowest, or highest.

    Attributes:
        sparsity: How many are pruned, and among which.
        scope: Whose matrices and kernels are pruned; None for the eraser's.
        fill: What pruned weights become.
    """

    needs_objective: ClassVar[bool] = False

    sparsity: Sparsity = Field(default_factory=Sparsity)
    scope: UNetScope | None = None
    fill: Fill = "zero"

    @abstractmethod
    def masks(
        self, model: TextToImage, concept: Concept, weights: Weights, *, seed: int, checkpoint: Path | None
    ) -> tuple[Masks, int]:
        """Choose what is pruned of ``weights``, and say what U-Net evaluations that cost, in an interrupted run too."""

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
        """See :class:`erasure.protocols.Pruning`."""
        scope = self.scope or scope
        weights = maskable_parameters(model, scope)
        self.sparsity.check(weights)
        masks, spent = self.masks(model, concept, weights, seed=seed, checkpoint=checkpoint)
        return pruned_by(masks, scope=scope, fill=self.fill, seed=seed, unet_evaluations=spent)
