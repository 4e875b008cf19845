"""Random pruning: any weights go."""

from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from diffusion.model import TextToImage
from erasure.concept import Concept
from erasure.parameters import UNetScope
from erasure.protocols import Erasure, Objective
from erasure.pruning.masks import maskable_parameters, prune_fraction


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Random:
    """Prunes weights of the scope chosen by the seed alone: the control of what sparsity itself does.

    Attributes:
        fraction: Of the scope's weights, rounded down.
        scope: Whose matrices and kernels are pruned; None for the eraser's.
    """

    needs_objective: ClassVar[bool] = False

    fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    scope: UNetScope | None = None

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
        scores = {name: torch.rand(weight.shape, generator=generator) for name, weight in weights.items()}
        return prune_fraction(scores, self.fraction, scope)
