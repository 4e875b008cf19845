"""Magnitude pruning: the smallest weights go."""

from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from diffusion.model import TextToImage
from erasure.concept import Concept
from erasure.edit import Fill
from erasure.parameters import UNetScope
from erasure.protocols import Erasure, Objective
from erasure.pruning.masks import Sparsity, maskable_parameters, pruned_by


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Magnitude:
    """Prunes the weights of the smallest |W|, whatever the concept: a control.

    Attributes:
        sparsity: How many are pruned, and among which.
        scope: Whose matrices and kernels are pruned; None for the eraser's.
        fill: What pruned weights become.
    """

    needs_objective: ClassVar[bool] = False

    sparsity: Sparsity = Field(default_factory=Sparsity)
    scope: UNetScope | None = None
    fill: Fill = "zero"

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
        masks = self.sparsity.kept({name: weight.abs() for name, weight in weights.items()})
        return pruned_by(masks, scope=scope, fill=self.fill, seed=seed)
