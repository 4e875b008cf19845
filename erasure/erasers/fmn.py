"""FMN: take the cross-attention away from the concept's tokens."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from diffusion.checked import checked
from diffusion.model import TextToImage
from diffusion.needs import CROSS_ATTENTION, Need
from diffusion.streams import derived_seed, stream
from erasure.attention import concept_columns, concept_squares, recorded_attention
from erasure.concept import Concept
from erasure.finetuning import FineTuning, Trained, retaining
from erasure.parameters import UNetScope
from erasure.pictures import Painting, paint
from erasure.protocols import Objective
from erasure.trajectories import Trajectories


@checked
class FMN(Trained):
    """Forget-Me-Not (Zhang et al., "Learning to Forget in Text-to-Image Diffusion Models", CVPR workshops 2024).

    Attention re-steering: L = || A ||_F, where A holds the cross-attention probabilities of all layers, heads and
    pixels at the columns of the concept's tokens, while the U-Net looks at x_t under the concept's prompt. x_t is a
    noised picture of the concept that the model made of that prompt, t is uniform; a batch takes the mean over its
    samples. The textual inversion that can precede it is left out. The defaults are the authors'.

    Attributes:
        scope: What is trained.
        norm: ``joint``, one norm over all layers; or ``layers``, the sum of a norm per layer (MACE).
        end_tokens: Whether the end token and the padding after it count as the concept's ("use_pooler").
        steps: Optimiser steps (AdamW).
        learning_rate: AdamW's.
        batch_size: Noised pictures per step.
        images: Pictures of the concept, made once; targets and templates take turns.
        sampling_steps: Sampler steps of a picture, and of the retain term's trajectories.
        image_guidance: Guidance scale of a picture.
        weight_decay: AdamW's.
        clip_norm: Largest norm of the gradient.
        retain_weight: Weight of the retain term on the concept's preserved phrases; 0, as in the paper, for none.
        retain_batch_size: Preserved samples per step.
        retain_trajectories: Of the retain term; see :class:`erasure.trajectories.Trajectories`.
        sampling_batch_size: Pictures sampled at a time; it changes speed and memory only.
    """

    scope: UNetScope = "full"
    norm: Literal["joint", "layers"] = "joint"
    end_tokens: bool = True
    steps: Annotated[int, Field(ge=1)] = 35
    learning_rate: Annotated[float, Field(gt=0)] = 2e-6
    batch_size: Annotated[int, Field(ge=1)] = 1
    images: Annotated[int, Field(ge=1)] = 8
    sampling_steps: Annotated[int, Field(ge=1, le=1000)] = 50
    image_guidance: Annotated[float, Field(ge=0)] = 7.5
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    retain_weight: Annotated[float, Field(ge=0)] = 0.0
    retain_batch_size: Annotated[int, Field(ge=1)] = 8
    retain_trajectories: Annotated[int, Field(ge=1)] | None = None
    sampling_batch_size: Annotated[int, Field(ge=1)] = 64

    needs: ClassVar[frozenset[Need]] = CROSS_ATTENTION

    def objective(self) -> Objective:
        """The loss, with the retain term if it has weight."""
        trajectories = Trajectories(
            self.sampling_steps, self.image_guidance, self.retain_trajectories, self.sampling_batch_size
        )
        return retaining(FMNObjective(self), self.retain_weight, trajectories, self.retain_batch_size)

    def training(self, model: TextToImage, concept: Concept) -> FineTuning:
        """See :class:`erasure.finetuning.Trained`."""
        return FineTuning(self.scope, self.steps, self.learning_rate, self.weight_decay, self.clip_norm)


class FMNObjective:
    """The loss of :class:`FMN`, the concept's pictures and the columns of its tokens."""

    def __init__(self, config: FMN) -> None:
        self._config = config

    def prepare(
        self, model: TextToImage, concept: Concept, *, scope: UNetScope, steps: int, seed: int, checkpoint: Path | None
    ) -> int:
        """See :class:`erasure.protocols.Objective`.

        Raises:
            ValueError: The model has no cross-attention.
        """
        # In a transformer's joint attention a picture's columns are no cross-attention: refused before any work.
        model.denoiser.text_attention()
        config = self._config
        self._seed = seed
        self._columns = concept_columns(model, concept, end_tokens=config.end_tokens).to(model.device)
        prompts = concept.target_prompts
        self._text = model.encode_prompts(prompts)
        painting = Painting(config.images, config.sampling_steps, config.image_guidance, config.sampling_batch_size)
        self._pictures, spent = paint(
            model,
            prompts,
            self._text,
            painting,
            seed=derived_seed(seed, "fmn/pictures"),
            part="concept",
            checkpoint=checkpoint,
        )
        return spent

    def loss(self, model: TextToImage, step: int) -> Tensor:
        """See :class:`erasure.protocols.Objective`."""
        batch = self._pictures.draw(model, self._config.batch_size, stream(self._seed, "fmn/training", step))
        with recorded_attention(model) as attention:
            model.predict(batch.latents, batch.timesteps, self._text[batch.prompts])
        squares = concept_squares(attention, self._columns[batch.prompts])
        norms = squares.sqrt().sum(0) if self._config.norm == "layers" else squares.sum(0).sqrt()
        return norms.mean()
