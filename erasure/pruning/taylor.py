"""Taylor: the weights that the denoising of what must stay depends on least go."""

from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field

from diffusion.checked import checked
from diffusion.model import TextToImage
from diffusion.streams import derived_seed
from erasure.concept import Concept
from erasure.finetuning import gradient
from erasure.pictures import Painting
from erasure.pruning.calibration import DenoisingLoss, Prompts, prompts_of
from erasure.pruning.masks import Masks
from erasure.pruning.scored import Scored, Weights


@checked
class Taylor(Scored):
    """First-order importance over timesteps (Fang et al., "Structural Pruning for Diffusion Models", NeurIPS 2023).

    S = sum over { t : L_t > threshold * max_t L_t } of |W * grad L_t|, the lowest pruned, with L_t the denoising loss
    at t. They prune channels of unconditional models; here single weights are scored, on pictures of prompts.

    Attributes:
        threshold: Timesteps with less loss, relative to the largest, say little about the picture and are left out.
        prompts: What the pictures are of: the concept's ``preserved`` phrases, its ``anchors`` or its ``targets``.
        pictures: How many, the prompts spread evenly over them.
        timesteps: Number of t, evenly spread over the noise schedule.
        sampling_steps: Sampler steps of a picture.
        guidance: Guidance scale of a picture.
        batch_size: Pictures at a time when there are gradients; it changes speed and memory only.
        sampling_batch_size: Pictures sampled at a time; it changes speed and memory only.
    """

    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.05
    prompts: Prompts = "preserved"
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
            prompts_of(concept, self.prompts),
            Painting(self.pictures, self.sampling_steps, self.guidance, self.sampling_batch_size),
            timesteps=self.timesteps,
            batch_size=self.batch_size,
            seed=derived_seed(seed, "taylor/pictures"),
            checkpoint=checkpoint,
        )
        before = model.unet_evaluations
        with torch.no_grad():
            losses = [float(torch.stack(list(loss.parts(model, place))).sum()) for place in range(self.timesteps)]
        scores = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights.items()}
        with model.trainable(list(weights.values())):
            for place in range(self.timesteps):
                if losses[place] > self.threshold * max(losses):
                    for name, value in gradient(model, loss.parts(model, place), weights).items():
                        scores[name] += (weights[name].detach() * value).abs()
        spent = loss.unet_evaluations + model.unet_evaluations - before
        return self.sparsity.kept(scores), spent
