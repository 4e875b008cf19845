"""Wanda: the weights that matter least to what must stay go, by size times use."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from diffusion.checked import checked
from diffusion.model import TextToImage
from diffusion.streams import derived_seed
from erasure.concept import Concept
from erasure.pictures import Painting
from erasure.pruning.calibration import Prompts, input_squares, prompts_of, sizes_times_use, spread
from erasure.pruning.masks import Masks, Sparsity
from erasure.pruning.scored import Scored, Weights


@checked
class Wanda(Scored):
    """Wanda (Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024).

    S_ij = |W_ij| ||X_j||_2, the lowest of every row pruned, with X_j all values of input j: here over the positions of
    the pictures and the steps of their sampling, both halves of guidance. A kernel's X_j is what its weight j is
    multiplied with. Every layer is scored on the inputs that it has before anything is pruned.

    Attributes:
        prompts: What the pictures are of: the concept's ``preserved`` phrases, its ``anchors`` or its ``targets``.
        pictures: How many, the prompts spread evenly over them.
        sampling_steps: Sampler steps of a picture.
        guidance: Guidance scale of a picture.
        sampling_batch_size: Pictures sampled at a time; it changes speed and memory only.
    """

    sparsity: Sparsity = Field(default_factory=lambda: Sparsity(0.5, "row"))
    prompts: Prompts = "preserved"
    pictures: Annotated[int, Field(ge=1)] = 128
    sampling_steps: Annotated[int, Field(ge=1, le=1000)] = 50
    guidance: Annotated[float, Field(ge=0)] = 7.5
    sampling_batch_size: Annotated[int, Field(ge=1)] = 64

    def masks(
        self, model: TextToImage, concept: Concept, weights: Weights, *, seed: int, checkpoint: Path | None
    ) -> tuple[Masks, int]:
        """See :class:`erasure.pruning.scored.Scored`."""
        painting = Painting(self.pictures, self.sampling_steps, self.guidance, self.sampling_batch_size)
        prompts = prompts_of(concept, self.prompts)
        text = model.encode_prompts(prompts)[spread(prompts, self.pictures)]
        own_seed = derived_seed(seed, "wanda/pictures")
        squares, spent = input_squares(model, weights, text, painting, seed=own_seed, checkpoint=checkpoint)
        scores = sizes_times_use(weights, {name: steps.sum(0) for name, steps in squares.items()})
        return self.sparsity.kept(scores), spent
