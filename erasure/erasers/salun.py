"""SalUn: unlearn with the weights that the concept depends on most, and with no others."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from diffusion.checked import checked
from diffusion.model import TextToImage
from diffusion.parameters import substituted
from diffusion.streams import derived_seed, stream
from erasure.concept import Concept
from erasure.finetuning import FineTuning, Trained, gradient, noise_error, require_preserved
from erasure.parameters import UNetScope, scope_parameters
from erasure.pictures import Painting, paint
from erasure.protocols import Objective
from erasure.pruning.masks import cut_lowest
from erasure.trajectories import remembered


@checked
class SalUn(Trained):
    """Saliency unlearning (Fan et al., "SalUn", ICLR 2024).

    The mask m is 1 where |g| is among the largest ``trained_fraction`` of the whole scope, else 0, with
    g = grad_theta of the sum over D_f of || eps - e_w(x_t, c_f, t) ||^2,
    e_w(x, c, t) = e(x, 0, t) + w (e(x, c, t) - e(x, 0, t)). Then m * theta, and nothing else, is trained (Adam) on
    L = || e(x_t, c_f, t) - sg[e(x_t, c', t)] ||^2 + alpha || eps - e(y_t, c_r, t) ||^2 (means).
    D_f are pictures x that the model made of the target prompts c_f, c' is the anchor in the same template, y are
    pictures it made of the preserved prompts c_r; t is uniform, and sg stops the gradient of the current model's own
    prediction. The defaults are the authors', for classes.

    Attributes:
        scope: What is masked and trained.
        trained_fraction: Of the scope's weights, rounded down; of equal |g| the later weights are trained.
        saliency_guidance: w; 1 is the conditional prediction alone.
        steps: Optimiser steps.
        learning_rate: Adam's.
        batch_size: Noised pictures of each kind per step.
        images: Pictures in D_f, made once; targets and templates take turns.
        retain_weight: alpha; 0 for no such term.
        retain_images: Pictures of the preserved prompts, which take turns.
        sampling_steps: Sampler steps of a picture.
        image_guidance: Guidance scale of a picture.
        sampling_batch_size: Pictures sampled at a time; it changes speed and memory only.
    """

    scope: UNetScope = "full"
    trained_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    saliency_guidance: Annotated[float, Field(ge=0)] = 8.5
    steps: Annotated[int, Field(ge=1)] = 500
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    batch_size: Annotated[int, Field(ge=1)] = 8
    images: Annotated[int, Field(ge=1)] = 800
    retain_weight: Annotated[float, Field(ge=0)] = 0.5
    retain_images: Annotated[int, Field(ge=1)] = 800
    sampling_steps: Annotated[int, Field(ge=1, le=1000)] = 50
    image_guidance: Annotated[float, Field(ge=0)] = 7.5
    sampling_batch_size: Annotated[int, Field(ge=1)] = 64

    def painting(self, images: int) -> Painting:
        """How so many pictures are made."""
        return Painting(images, self.sampling_steps, self.image_guidance, self.sampling_batch_size)

    def objective(self) -> Objective:
        """The loss under the mask."""
        return SalUnObjective(self)

    def training(self, model: TextToImage, concept: Concept) -> FineTuning:
        """See :class:`erasure.finetuning.Trained`."""
        return FineTuning(self.scope, self.steps, self.learning_rate)


class SalUnObjective:
    """The loss of :class:`SalUn`, the pictures and the mask that it needs."""

    def __init__(self, config: SalUn) -> None:
        self._config = config

    def prepare(
        self, model: TextToImage, concept: Concept, *, scope: UNetScope, steps: int, seed: int, checkpoint: Path | None
    ) -> int:
        """See :class:`erasure.protocols.Objective`."""
        config = self._config
        self._seed = seed
        if config.retain_weight:
            require_preserved(concept, config.retain_weight)
        self._targets = model.encode_prompts(concept.target_prompts)
        self._anchors = model.encode_prompts(concept.target_anchors)
        self._forgotten, spent = paint(
            model,
            concept.target_prompts,
            self._targets,
            config.painting(config.images),
            seed=derived_seed(seed, "salun/forgotten"),
            part="forgotten",
            checkpoint=checkpoint,
        )
        if config.retain_weight:
            self._preserved = model.encode_prompts(concept.preserved_prompts)
            self._retained, more = paint(
                model,
                concept.preserved_prompts,
                self._preserved,
                config.painting(config.retain_images),
                seed=derived_seed(seed, "salun/retained"),
                part="retained",
                checkpoint=checkpoint,
            )
            spent += more
        self._masks, more = remembered(checkpoint, "saliency", lambda: self._salient(model, scope), model)
        return spent + more

    def loss(self, model: TextToImage, step: int) -> Tensor:
        """See :class:`erasure.protocols.Objective`; weights outside the mask get a gradient of exactly zero."""
        config = self._config
        current = dict(model.unet.named_parameters())
        masked = {name: torch.where(mask, current[name], current[name].detach()) for name, mask in self._masks.items()}
        generator = stream(self._seed, "salun/training", step)
        batch = self._forgotten.draw(model, config.batch_size, generator)
        with substituted(model, masked):
            with torch.no_grad():
                anchored = model.predict_noise(batch.latents, batch.timesteps, self._anchors[batch.prompts])
            targets = anchored.to(batch.latents.dtype)
            loss = noise_error(model, batch.latents, batch.timesteps, self._targets[batch.prompts], targets)
            if config.retain_weight:
                kept = self._retained.draw(model, config.batch_size, generator)
                text = self._preserved[kept.prompts]
                retaining = noise_error(model, kept.latents, kept.timesteps, text, kept.noise)
                loss = loss + config.retain_weight * retaining
        return loss

    def _salient(self, model: TextToImage, scope: UNetScope) -> dict[str, Tensor]:
        """The mask m by parameter name, bool."""
        config = self._config
        parameters = scope_parameters(model, scope)
        unconditional = model.encode_prompts([""])[0]

        def losses() -> Iterator[Tensor]:
            for number, picks in enumerate(torch.arange(config.images).split(config.batch_size)):
                batch = self._forgotten.noised(model, picks, stream(self._seed, "salun/saliency", number))
                text = self._targets[batch.prompts]
                if config.saliency_guidance == 1:
                    noise = model.predict_noise(batch.latents, batch.timesteps, text)
                else:
                    noise = model.guided_noise(
                        batch.latents, batch.timesteps, text, unconditional, config.saliency_guidance
                    )
                yield functional.mse_loss(noise.to(batch.noise.dtype), batch.noise, reduction="sum")

        with model.trainable(list(parameters.values())):
            saliency = {name: value.abs() for name, value in gradient(model, losses(), parameters).items()}
        weights = sum(value.numel() for value in saliency.values())
        return cut_lowest(saliency, weights - math.floor(config.trained_fraction * weights))
