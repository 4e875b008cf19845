"""Random pruning: any weights go."""

import math
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from diffusion.model import TextToImage
from erasure.concept import Concept
from erasure.edit import Edit
from erasure.parameters import UNetScope
from erasure.protocols import Erasure, Objective
from erasure.pruning.masks import cut_lowest, mask_counts, maskable_parameters


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
        weights = maskable_parameters(model, self.scope or scope)
        generator = torch.Generator().manual_seed(seed)
        scores = {name: torch.rand(weight.shape, generator=generator) for name, weight in weights.items()}
        count = math.floor(self.fraction * sum(weight.numel() for weight in weights.values()))
        masks = cut_lowest(scores, count)
        return Erasure(Edit.from_mask(masks, {"scope": self.scope or scope, **mask_counts(masks)}), [], 0)
