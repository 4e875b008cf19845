"""Random pruning: any weights go."""

from pathlib import Path
from typing import ClassVar

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from diffusion.model import TextToImage
from erasure.concept import Concept
from erasure.edit import Fill
from erasure.parameters import UNetScope
from erasure.protocols import Erasure, Objective
from erasure.pruning.masks import Sparsity, maskable_parameters, pruned_by


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Random:
    """Prunes weights of the scope chosen by the seed alone: the control of what sparsity itself does.

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
        generator = torch.Generator().manual_seed(seed)
        weights = maskable_parameters(model, scope)
        self.sparsity.check(weights)
        scores = {name: torch.rand(weight.shape, generator=generator) for name, weight in weights.items()}
        return pruned_by(self.sparsity.kept(scores), scope=scope, fill=self.fill, seed=seed)
