"""The variance-preserving noise process: what a network's output says of the noise in x_t."""

from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction", "sample"]
"""What a network was trained to predict of x_t = sqrt(abar) x_0 + sqrt(1 - abar) noise: the noise; the velocity
sqrt(abar) noise - sqrt(1 - abar) x_0 (Salimans and Ho, ICLR 2022); or the picture x_0."""

LEAST_ABAR = 2.0**-24
"""What stands for an abar of 0, as in the samplers of diffusers that divide by it. With a schedule that ends in pure
noise (Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", WACV 2024), the noise in x_T alone
says nothing of x_0; with this abar it does, in float32, and x_T is changed by a four-thousandth."""


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """``dtype``, or float32 if that is more precise."""
    return torch.promote_types(dtype, torch.float32)


def as_noise(output: Tensor, latents: Tensor, alphas: Tensor, predicts: str) -> Tensor:
    """The noise in ``latents`` according to a network's output, both float [n, c, h, w].

    Args:
        output: What the network predicts.
        latents: x_t.
        alphas: abar, float [n, 1, 1, 1], above 0; float32 at least, which the result is then in.
        predicts: What that is; one of :data:`Prediction`.
    """
    if predicts == "epsilon":
        return output
    if predicts == "v_prediction":
        return alphas.sqrt() * output + (1 - alphas).sqrt() * latents
    return (latents - alphas.sqrt() * output) / (1 - alphas).sqrt()


def without_zeros(alphas: Tensor) -> Tensor:
    """Abar by timestep, float [timesteps], with :data:`LEAST_ABAR` where the schedule has 0."""
    return torch.where(alphas > 0, alphas, LEAST_ABAR)


def betas_of(alphas: Tensor) -> list[float]:
    """The beta of every timestep, 1 - abar_t / abar_(t - 1), of abar float [timesteps]."""
    precise = alphas.double()
    return (1 - precise / torch.cat([precise.new_ones(1), precise[:-1]])).tolist()  # type: ignore[no-any-return]
