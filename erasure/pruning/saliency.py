"""Saliency: the weights that the concept's denoising depends on most go."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from diffusion.checked import checked
from diffusion.model import TextToImage
from diffusion.streams import derived_seed
from erasure.concept import Concept
from erasure.finetuning import gradient
from erasure.pictures import Painting
from erasure.pruning.calibration import DenoisingLoss
from erasure.pruning.masks import Masks, Sparsity
from erasure.pruning.scored import Scored, Weights


@checked
class Saliency(Scored):
    """Gradient saliency under the concept's denoising loss, the highest pruned.

    g = grad of sum_t || eps - eps_theta(x_t, c, t) ||^2 with x_t noised pictures that the model made of the concept's
    prompts c. S = |g W| is SNIP's connection sensitivity (Lee et al., ICLR 2019), by which Scissorhands (Wu and
    Harandi, ECCV 2024) finds what forgetting must change; S = |g| is SalUn's (Fan et al., ICLR 2024).

    Attributes:
        score: ``snip`` is |g W|, ``salun`` is |g|.
        pictures: How many, the prompts spread evenly over them.
        timesteps: Number of t, evenly spread over the noise schedule.
        sampling_steps: Sampler steps of a picture.
        guidance: Guidance scale of a picture.
        batch_size: Pictures at a time when there are gradients; it changes speed and memory only.
        sampling_batch_size: Pictures sampled at a time; it changes speed and memory only.
    """

    score: Literal["snip", "salun"] = "snip"
    sparsity: Sparsity = Field(default_factory=lambda: Sparsity(0.01))
    pictures: Annotated[int, Field(ge=1)] = 32
    timesteps: Annotated[int, Field(ge=1, le=1000)] = 10
    sampling_steps: Annotated[int, Field(ge=1, le=1000)] = 50
    guidance: Annotated[float, Field(ge=0)] = 7.5
    batch_size: Annotated[int, Field(ge=1)] = 8
    sampling_batch_size: Annotated[int, Field(ge=1)] = 64

    def masks(
        self, model: TextToImage, concept: Concept, weights: Weights, *, seed: int, checkpoint: Path | None
    ) -> tuple[Masks, int]:
        """See :class:`erasure.pruning.scored.Scored`."""
        loss = DenoisingLoss(
            model,
            concept.target_prompts,
            Painting(self.pictures, self.sampling_steps, self.guidance, self.sampling_batch_size),
            timesteps=self.timesteps,
            batch_size=self.batch_size,
            seed=derived_seed(seed, "saliency/pictures"),
            checkpoint=checkpoint,
        )
        before = model.unet_evaluations
        with model.trainable(list(weights.values())):
            parts = (part for place in range(self.timesteps) for part in loss.parts(model, place))
            gradients = gradient(model, parts, weights)
        factors = weights if self.score == "snip" else dict.fromkeys(weights, 1)
        masks = self.sparsity.kept({name: -(value * factors[name]).abs() for name, value in gradients.items()})
        spent = loss.unet_evaluations + model.unet_evaluations - before
        return masks, spent
