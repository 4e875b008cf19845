"""AC: make the concept's prompts predict what their anchor's predict."""

from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from diffusion.model import TextToImage
from diffusion.training import step_generator
from erasure.concept import Concept
from erasure.finetuning import FineTuning, Retaining, erase_by_training, noise_error
from erasure.parameters import UNetScope
from erasure.pictures import Painting, paint
from erasure.protocols import Erasure, Objective, Pruning
from erasure.trajectories import Trajectories


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class AC:
    """Concept ablation (Kumari et al., "Ablating Concepts in Text-to-Image Diffusion Models", ICCV 2023).

    L = || eps_theta(x_t, c*, t) - sg[eps_theta(x_t, c, t)] ||^2 (mean), their model-based variant: c* names the
    target, c the anchor in the same template, x_t is a noised picture that the model made of c, t is uniform, and sg
    stops the gradient of the current model's own prediction. The defaults are the authors', on one GPU.

    Attributes:
        scope: What is trained.
        steps: Optimiser steps (AdamW).
        learning_rate: AdamW's.
        batch_size: Noised pictures per step; several targets take turns.
        images: Pictures of the anchor, made once; the concept's templates take turns.
        sampling_steps: Sampler steps of a picture, and of the retain term's trajectories.
        image_guidance: Guidance scale of a picture.
        weight_decay: AdamW's.
        clip_norm: Largest norm of the gradient.
        retain_weight: Weight of the retain term on the concept's preserved phrases; 0 for none.
        sampling_batch_size: Pictures sampled at a time; it changes speed and memory only.
    """

    has_objective: ClassVar[bool] = True

    scope: UNetScope = "xattn_kv"
    steps: Annotated[int, Field(ge=1)] = 200
    learning_rate: Annotated[float, Field(gt=0)] = 8e-6
    batch_size: Annotated[int, Field(ge=1)] = 4
    images: Annotated[int, Field(ge=1)] = 1000
    sampling_steps: Annotated[int, Field(ge=1, le=1000)] = 25
    image_guidance: Annotated[float, Field(ge=0)] = 6.0
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    retain_weight: Annotated[float, Field(ge=0)] = 0.0
    sampling_batch_size: Annotated[int, Field(ge=1)] = 64

    def objective(self) -> Objective:
        """The loss, with the retain term if it has weight."""
        ablating = ACObjective(self)
        if not self.retain_weight:
            return ablating
        trajectories = Trajectories(self.sampling_steps, self.image_guidance, None, self.sampling_batch_size)
        return Retaining(ablating, self.retain_weight, trajectories, self.batch_size)

    def erase(
        self, model: TextToImage, concept: Concept, pruning: Pruning, *, seed: int, checkpoint: Path | None = None
    ) -> Erasure:
        """See :class:`erasure.protocols.Eraser`."""
        training = FineTuning(self.scope, self.steps, self.learning_rate, self.weight_decay, self.clip_norm)
        return erase_by_training(
            self, self.objective(), training, model, concept, pruning, seed=seed, checkpoint=checkpoint
        )


class ACObjective:
    """The loss of :class:`AC` and the anchor's pictures that it needs."""

    def __init__(self, config: AC) -> None:
        self._config = config

    def prepare(
        self, model: TextToImage, concept: Concept, *, scope: UNetScope, steps: int, seed: int, checkpoint: Path | None
    ) -> int:
        """See :class:`erasure.protocols.Objective`."""
        config = self._config
        self._seed = seed
        templates = len(concept.templates)
        self._targets = model.encode_prompts(concept.target_prompts).unflatten(0, (-1, templates))
        self._anchors = model.encode_prompts(concept.anchor_prompts)
        painting = Painting(config.images, config.sampling_steps, config.image_guidance, config.sampling_batch_size)
        self._pictures, spent = paint(model, self._anchors, painting, seed=seed, part="anchors", checkpoint=checkpoint)
        return spent

    def loss(self, model: TextToImage, step: int) -> Tensor:
        """See :class:`erasure.protocols.Objective`."""
        size = self._config.batch_size
        batch = self._pictures.draw(model, size, step_generator(self._seed, step))
        phrases = torch.arange(step * size, (step + 1) * size) % len(self._targets)
        with torch.no_grad():
            anchored = model.predict_noise(batch.latents, batch.timesteps, self._anchors[batch.prompts])
        text = self._targets[phrases, batch.prompts]
        return noise_error(model, batch.latents, batch.timesteps, text, anchored.to(batch.latents.dtype))
