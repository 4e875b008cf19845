"""Magnitude pruning: the smallest weights go."""

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from diffusion.model import TextToImage
from erasure.concept import Concept
from erasure.parameters import UNetScope
from erasure.protocols import Erasure, Objective
from erasure.pruning.masks import maskable_parameters, prune_fraction


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Magnitude:
    """Prunes the weights of the smallest |W| over the whole scope, whatever the concept: a control.

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
        weights = maskable_parameters(model, scope)
        return prune_fraction({name: weight.abs() for name, weight in weights.items()}, self.fraction, scope)
