"""What a model's noise is: how it is added to pictures, what the network predicts of it, and how it is taken away."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class NoiseProcess(Protocol):
    """The noise process of a model. Each has a currency, what predictions and training targets are made in.

    Latents, noise and predictions are float [n, c, h, w]; timesteps [n] are 0 .. 999, or reals up to 1000 where the
    process is continuous. Guidance and all that weighs predictions with numbers that sum to 1 means the same in any
    currency.
    """

    @property
    def currency(self) -> str:
        """What predictions are: ``noise`` or ``velocity``."""

    @property
    def samplers(self) -> Sequence[str]:
        """Names of the samplers that it knows."""

    @property
    def config(self) -> dict[str, Any]:
        """What the checkpoint says of it: the configuration of its scheduler."""

    @property
    def length(self) -> int:
        """How many timesteps are told apart."""

    def noised(self, pictures: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents of pictures with unit Gaussian noise, as they are at ``timesteps``."""

    def target(self, pictures: Tensor, noise: Tensor) -> Tensor:
        """What should be predicted of :meth:`noised` latents."""

    def noise_share(self, timesteps: Tensor) -> Tensor | float:
        """What of a difference of predictions is a difference of noise: a number, or [n, 1, 1, 1]."""

    def told(self, output: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
        """What samplers are told where this is the network's output."""

    def prediction(self, told: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
        """What samplers are told, in the currency of the process."""

    def as_told(self, prediction: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
        """What samplers are to be told where this is predicted; the reverse of :meth:`prediction`."""

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Random timesteps, as training has them, [count]."""

    def draw_one(self, generator: torch.Generator) -> Tensor:
        """One of them, a number without dimensions."""

    def middle(self, share: int, shares: int) -> float:
        """The middle of one of equal shares of the timesteps, counted from the least noisy one."""

    def sampler(self, name: str, steps: int) -> Any:
        """A fresh sampler with diffusers' ``timesteps``, ``scale_model_input``, ``step`` and ``init_noise_sigma``."""

    def plain_sampler(self, name: str) -> Any:
        """The sampler as a part of a plain pipeline."""

    def sampled_at(self, name: str, steps: int) -> Tensor:
        """The timesteps of a sampler, in its order, as the network takes them."""

    def path(self, name: str, steps: int) -> tuple[Tensor, list[float]]:
        """The deterministic way from noise to picture at a sampler's timesteps.

        Returns:
            The timesteps [steps], and the levels of noise at each and at the end, for :meth:`move`.
        """

    def picture_share(self, level: float) -> float:
        """How much of a picture's energy is left at a level of :meth:`path`; at its first the rest is the noise's."""

    def move(self, latents: Tensor, prediction: Tensor, start: float, end: float) -> Tensor:
        """Latents at level ``start``, taken to ``end`` with what is predicted of them; both ways alike."""
