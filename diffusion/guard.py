"""What may stand between prompts and U-Net at inference, while the weights stay as they are."""

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

Encode = Callable[[Tensor, Tensor], Tensor]
"""(token embeddings [n, tokens, width], end positions [n]) -> text embeddings [n, tokens, width]."""

Guidance = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(latents [n, c, h, w], timesteps [n], text [n, tokens, width], unconditional [tokens, width] or as text, scales [n])
-> the noise of one sampler step, [n, c, h, w]."""


class Predictor(Protocol):
    """What a guard's guidance may ask of the model; :class:`diffusion.model.TextToImage` is one."""

    @property
    def device(self) -> torch.device:
        """Where the U-Net lives."""

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the U-Net's weights."""

    def predict(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """The prediction, [n, c, h, w]."""

    def noise_share(self, timesteps: Tensor) -> Tensor | float:
        """What of a difference of predictions is a difference of noise, to be multiplied with it."""

    def guided(
        self, latents: Tensor, timesteps: Tensor, text: Tensor, unconditional: Tensor, guidance: Tensor
    ) -> Tensor:
        """Classifier-free guidance, [n, c, h, w]."""


class Guard:
    """A defence at inference that everything meets which goes through the model: pictures and attacks alike.

    This one does nothing; others replace the methods that they need.

    Attributes:
        evaluations_per_step: U-Net evaluations of one picture's guided sampler step.
        always_guides: It has a guidance of its own, whatever the guidance scale.
    """

    evaluations_per_step: int = 2
    always_guides: bool = False

    def read(self, token_embeddings: Tensor, eos_positions: Tensor, encode: Encode) -> Tensor:
        """What prompts become when they are encoded, differentiable in the token embeddings.

        Text may be longer than ``encode`` returns it; :meth:`condition` makes of it what the U-Net takes.

        Args:
            token_embeddings: float [n, tokens, width], no positions added.
            eos_positions: int64 [n], where each prompt ends.
            encode: The text encoder.

        Returns:
            float [n, any, width].
        """
        return encode(token_embeddings, eos_positions)

    def pair(self, unconditional: Tensor, text: Tensor) -> Tensor:
        """The unconditional half of guidance that goes with ``text``, both float [n, any, width]."""
        return unconditional

    def condition(self, text: Tensor, timesteps: Tensor) -> Tensor:
        """What the U-Net is given at ``timesteps``, int64 [n], of ``text`` float [n, any, width]; [n, tokens, width].

        The U-Net's evaluation follows at once, so that what the guard adds to it can be set here.
        """
        return text

    def guidance(self, model: Predictor, steps: Iterable[int] | None = None) -> Guidance:
        """The guidance of one batch of pictures from their first sampler step to the last; it may remember.

        Args:
            model: What predicts.
            steps: Which sampler steps it is asked for in turn, from 0, if not for all in their order.
        """
        return model.guided
