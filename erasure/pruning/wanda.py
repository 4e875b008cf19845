"""Wanda: the weights that matter least to what must stay go, by size times use."""

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from diffusion.model import TextToImage
from erasure.concept import Concept
from erasure.edit import Fill
from erasure.parameters import UNetScope
from erasure.protocols import Erasure, Objective
from erasure.pruning.calibration import Pictures, Prompts, input_squares, prompts_of, sizes_times_use
from erasure.pruning.masks import Sparsity, maskable_parameters, pruned_by


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Wanda:
    """Wanda (Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024).

    S_ij = |W_ij| ||X_j||_2, the lowest of every row pruned, with X_j all values of input j: here over the positions of
    the pictures and the steps of their sampling, both halves of guidance. A kernel's X_j is what its weight j is
    multiplied with. Every layer is scored on the inputs that it has before anything is pruned.

    Attributes:
        sparsity: How many are pruned, and among which.
        scope: Whose matrices and kernels are pruned; None for the eraser's.
        fill: What pruned weights become.
        prompts: What the pictures are of: the concept's ``preserved`` phrases, its ``anchors`` or its ``targets``.
        pictures: How many, the prompts spread evenly over them.
        sampling_steps: Sampler steps of a picture.
        guidance: Guidance scale of a picture.
        sampling_batch_size: Pictures sampled at a time; it changes speed and memory only.
    """

    needs_objective: ClassVar[bool] = False

    sparsity: Sparsity = Field(default_factory=lambda: Sparsity(0.5, "row"))
    scope: UNetScope | None = None
    fill: Fill = "zero"
    prompts: Prompts = "preserved"
    pictures: Annotated[int, Field(ge=1)] = 128
    sampling_steps: Annotated[int, Field(ge=1, le=1000)] = 50
    guidance: Annotated[float, Field(ge=0)] = 7.5
    sampling_batch_size: Annotated[int, Field(ge=1)] = 64

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
        pictures = Pictures(self.pictures, self.sampling_steps, self.guidance, self.sampling_batch_size)
        text = pictures.text(model, prompts_of(concept, self.prompts))
        squares, spent = input_squares(model, weights, text, pictures, seed=seed, checkpoint=checkpoint)
        scores = sizes_times_use(weights, {name: steps.sum(0) for name, steps in squares.items()})
        return pruned_by(self.sparsity.kept(scores), scope=scope, fill=self.fill, seed=seed, unet_evaluations=spent)
