"""The rectified flow of Stable Diffusion 3 and FLUX, whose currency is the velocity."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from diffusion.precision import at_least_float32

TIMES = 1000
"""Timesteps are 1000 s, where s in 0 .. 1 is the share of noise."""

Spacing = Literal["to_least", "even"]
"""Sampler steps before the shift: from 1 to the least s that training knew, itself shifted (Stable Diffusion 3); or 1,
1 - 1/n, ..., 1/n (FLUX)."""

Density = Literal["logit_normal", "uniform"]
"""What u is before s = shift(u), where timesteps are drawn: the logistic function of a unit Gaussian number, as Stable
Diffusion 3 was trained (Esser et al., ICML 2024); or uniform, what samplers' steps are."""

_OTHER_SPACINGS = ("shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas")


@dataclass(frozen=True)
class FlowStep:
    """The latents after a step, in the form that diffusers' samplers have."""

    prev_sample: Tensor


class EulerSampler:
    """x += (s_next - s) v, in the manner of diffusers' samplers.

    Args:
        sigmas: float [steps + 1], s from 1 on; the last is 0.

    Attributes:
        timesteps: float [steps], 1000 s before each step.
        init_noise_sigma: What unit noise is multiplied with.
    """

    init_noise_sigma = 1.0

    def __init__(self, sigmas: Tensor) -> None:
        self.sigmas = sigmas
        self.timesteps = TIMES * sigmas[:-1]

    def scale_model_input(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """The latents as they are."""
        return latents

    def step(self, output: Tensor, timestep: Tensor, latents: Tensor) -> FlowStep:
        """Take the step that begins at ``timestep``, one of :attr:`timesteps`."""
        place = int((self.timesteps - timestep.to(self.timesteps)).abs().argmin())
        return FlowStep(latents + float(self.sigmas[place + 1] - self.sigmas[place]) * output)


class RectifiedFlow:
    """x_s = (1 - s) x_0 + s noise, s in 0 .. 1; the velocity noise - x_0 is predicted (Liu et al., ICLR 2023).

    Times are spaced by s = shift(u) = a u / (1 + (a - 1) u), u even from 0 to 1; a is the checkpoint's, or grows with
    the number of image tokens where its scheduler says so. See :class:`diffusion.processes.protocol.NoiseProcess`.

    Args:
        config: The configuration of the checkpoint's scheduler.
        tokens: Image tokens of a picture.
        name: What errors call the model.
        spacing: Of sampler steps.
        density: Of drawn timesteps.

    Attributes:
        shift: a.
        config: As above.

    Raises:
        ValueError: The times of the checkpoint are spaced in another way.
    """

    currency = "velocity"
    samplers = ("flow_euler",)
    length = TIMES

    def __init__(
        self,
        config: Mapping[str, Any],
        tokens: int,
        name: str,
        *,
        spacing: Spacing = "to_least",
        density: Density = "logit_normal",
    ) -> None:
        self.config = dict(config)
        if unknown := [field for field in _OTHER_SPACINGS if self.config.get(field)]:
            raise ValueError(
                f"The scheduler of {name!r} has {unknown[0]}={self.config[unknown[0]]!r}; a fixed or dynamic shift is "
                "all that is known here."
            )
        self.shift = _shift_of(self.config, tokens)
        self._spacing = spacing
        self._density = density

    def noised(self, pictures: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See :meth:`diffusion.processes.protocol.NoiseProcess.noised`."""
        s = (timesteps.to(pictures.device, at_least_float32(pictures.dtype)) / TIMES).reshape(-1, 1, 1, 1)
        return ((1 - s) * pictures + s * noise).to(pictures.dtype)

    def target(self, pictures: Tensor, noise: Tensor) -> Tensor:
        """The velocity."""
        return noise - pictures

    def noise_share(self, timesteps: Tensor) -> Tensor | float:
        """1 - s, as noise is x_s + (1 - s) velocity."""
        return (1 - timesteps / TIMES).reshape(-1, 1, 1, 1)

    def told(self, output: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
        """The network's own velocity."""
        return output

    def prediction(self, told: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
        """The same."""
        return told

    def as_told(self, prediction: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
        """The same."""
        return prediction

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Timesteps of the density, float [count]."""
        if self._density == "uniform":
            return TIMES * self._shifted(torch.rand(count, generator=generator))
        return TIMES * self._shifted(torch.randn(count, generator=generator).sigmoid())

    def draw_one(self, generator: torch.Generator) -> Tensor:
        """One of them, float []."""
        return self.draw(1, generator)[0]

    def middle(self, share: int, shares: int) -> float:
        """See :meth:`diffusion.processes.protocol.NoiseProcess.middle`; even in u."""
        return float(TIMES * self._shifted(torch.tensor((2 * share + 1) / (2 * shares))))

    def sampler(self, name: str, steps: int) -> EulerSampler:
        """A fresh sampler of ``steps`` steps."""
        if self._spacing == "even":
            u = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
        else:
            # What diffusers takes for the least u is shifted already if the shift is the checkpoint's own.
            least = torch.tensor(1 / TIMES, dtype=torch.float64)
            least = least if self.config.get("use_dynamic_shifting") else self._shifted(least)
            u = torch.linspace(1, float(least), steps, dtype=torch.float64)
        return EulerSampler(torch.cat([self._shifted(u), u.new_zeros(1)]).float())

    def sampled_at(self, name: str, steps: int) -> Tensor:
        """The sampler's timesteps in the order of sampling, float [steps]."""
        return self.sampler(name, steps).timesteps

    def path(self, name: str, steps: int) -> tuple[Tensor, list[float]]:
        """The sampler's timesteps, float [steps], and s at each and at the end."""
        sampler = self.sampler(name, steps)
        return sampler.timesteps, sampler.sigmas.tolist()

    def plain_sampler(self, name: str) -> FlowMatchEulerDiscreteScheduler:
        """The sampler as a part of a plain pipeline."""
        return FlowMatchEulerDiscreteScheduler.from_config(self.config)

    def picture_share(self, level: float) -> float:
        """(1 - s)^2."""
        return (1 - level) ** 2

    def move(self, latents: Tensor, prediction: Tensor, start: float, end: float) -> Tensor:
        """An Euler step."""
        return latents + (end - start) * prediction

    def _shifted(self, u: Tensor) -> Tensor:
        return self.shift * u / (1 + (self.shift - 1) * u)


def _shift_of(config: Mapping[str, Any], tokens: int) -> float:
    """The a of a checkpoint for pictures of so many image tokens."""
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift", 1.0))
    fewest, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, largest = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu: float = least + (tokens - fewest) * (largest - least) / (most - fewest)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)
