"""The variance-preserving process of Stable Diffusion 1, 2 and XL, whose currency is the noise."""

import math
from collections.abc import Mapping
from typing import Any, get_args

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
)
from torch import Tensor

from diffusion.precision import at_least_float32
from diffusion.processes.noise_schedule import Prediction, as_noise, betas_of, without_zeros

SCHEDULERS: dict[str, type] = {
    "ddim": DDIMScheduler,
    "lms": LMSDiscreteScheduler,
    "pndm": PNDMScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
}
"""The samplers on offer. One of them serves every method that is compared."""

SCHEDULER_OPTIONS: dict[str, dict[str, bool]] = {"ddim": {"clip_sample": False}, "pndm": {"skip_prk_steps": True}}
"""What Stable Diffusion asks of a sampler, whatever the checkpoint's own scheduler was."""

_SCHEDULER_ORIGIN = {"_class_name", "_diffusers_version"}


class VarianceProcess:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, t in 0 .. 999.

    See :class:`diffusion.processes.protocol.NoiseProcess`.

    Args:
        config: The configuration of the checkpoint's scheduler.
        name: What errors call the model.

    Attributes:
        alphas: abar by timestep, float [timesteps], above 0.
        config: As above.

    Raises:
        ValueError: The network predicts what is unknown, or noise where the schedule ends in nothing else.
    """

    currency = "noise"
    samplers = tuple(SCHEDULERS)

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        self.config = dict(config)
        trained = DDIMScheduler.from_config(self.config).alphas_cumprod
        self._reaches_pure_noise = not bool(trained.all())
        self.alphas: Tensor = without_zeros(trained)
        if self.prediction_type not in get_args(Prediction):
            raise ValueError(
                f"The scheduler's prediction_type of {name!r} is {self.prediction_type!r}; it must be one of "
                f"{', '.join(get_args(Prediction))}."
            )
        if self._reaches_pure_noise and self.prediction_type == "epsilon":
            raise ValueError(
                f"The noise schedule of {name!r} ends in pure noise (rescale_betas_zero_snr), where its "
                "prediction_type 'epsilon' says nothing of the picture; correct the scheduler's configuration."
            )

    @property
    def prediction_type(self) -> str:
        """What the network was trained to predict; one of :data:`diffusion.processes.noise_schedule.Prediction`."""
        return str(self.config.get("prediction_type", "epsilon"))

    @property
    def length(self) -> int:
        """Number of timesteps of the noise schedule (1000 for Stable Diffusion)."""
        return len(self.alphas)

    def noised(self, pictures: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See :meth:`diffusion.processes.protocol.NoiseProcess.noised`."""
        alphas = self._at(timesteps, pictures)
        return (alphas.sqrt() * pictures + (1 - alphas).sqrt() * noise).to(pictures.dtype)

    def target(self, pictures: Tensor, noise: Tensor) -> Tensor:
        """The noise."""
        return noise

    def noise_share(self, timesteps: Tensor) -> Tensor | float:
        """All of it."""
        return 1.0

    def told(self, output: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
        """Velocity of a network that predicts it, else noise.

        Not every sampler takes a prediction of the picture, and none makes another picture of the noise in its place.
        """
        if self.prediction_type == "sample":
            return as_noise(output, latents, self._at(timesteps, output), self.prediction_type)
        return output

    def prediction(self, told: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
        """The noise; what was velocity is in float32 at least."""
        if self.prediction_type == "v_prediction":
            return as_noise(told, latents, self._at(timesteps, told), self.prediction_type)
        return told

    def as_told(self, prediction: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
        """See :meth:`diffusion.processes.protocol.NoiseProcess.as_told`.

        A sampler that combines the predictions of several steps, as PNDM does, gives another picture if it is told
        noise by a model that predicts velocity. So no noise of such a model is given to a sampler as it is.
        """
        if self.prediction_type != "v_prediction":
            return prediction
        alphas = self._at(timesteps, latents)
        return (prediction - (1 - alphas).sqrt() * latents) / alphas.sqrt()

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Uniform timesteps, int64 [count]."""
        return torch.randint(self.length, (count,), generator=generator)

    def draw_one(self, generator: torch.Generator) -> Tensor:
        """One of them, int64 []."""
        return torch.randint(self.length, (), generator=generator)

    def middle(self, share: int, shares: int) -> int:
        """See :meth:`diffusion.processes.protocol.NoiseProcess.middle`."""
        return (2 * share + 1) * self.length // (2 * shares)

    def sampler(self, name: str, steps: int) -> Any:
        """A fresh sampler of ``steps`` steps on the model's own noise schedule."""
        config = {key: value for key, value in self.config.items() if key not in _SCHEDULER_ORIGIN}
        if self._reaches_pure_noise:
            # Not every sampler knows the rescaling, and those that do treat its last step differently.
            config |= {"trained_betas": betas_of(self.alphas), "rescale_betas_zero_snr": False}
        told = "v_prediction" if self.prediction_type == "v_prediction" else "epsilon"
        options = {"prediction_type": told, **SCHEDULER_OPTIONS.get(name, {})}
        scheduler = SCHEDULERS[name].from_config(config, **options)  # type: ignore[attr-defined]
        scheduler.set_timesteps(steps)
        return scheduler

    def plain_sampler(self, name: str) -> Any:
        """The sampler as a part of a plain pipeline."""
        return SCHEDULERS[name].from_config(self.sampler(name, 1).config)  # type: ignore[attr-defined]

    def sampled_at(self, name: str, steps: int) -> Tensor:
        """The sampler's timesteps in the order of sampling, int64 [steps] (PNDM repeats one)."""
        return self.sampler(name, steps).timesteps.round().long()  # type: ignore[no-any-return]

    def path(self, name: str, steps: int) -> tuple[Tensor, list[float]]:
        """A DDIM sampler's timesteps, int64 [steps], and abar at each and at the end."""
        timesteps = sorted(set(self.sampled_at(name, steps).tolist()), reverse=True)
        # Stable Diffusion's last step ends at the first abar, others' at 1.
        last = getattr(self.sampler(name, steps), "final_alpha_cumprod", self.alphas[0])
        levels = [*(float(self.alphas[timestep]) for timestep in timesteps), float(last)]
        return torch.tensor(timesteps), levels

    def picture_share(self, level: float) -> float:
        """Abar."""
        return level

    def move(self, latents: Tensor, prediction: Tensor, start: float, end: float) -> Tensor:
        """Keep x_0 and noise of latents at abar ``start`` and mix them as at abar ``end`` (DDIM)."""
        picture = (latents - math.sqrt(1 - start) * prediction) / math.sqrt(start)
        return math.sqrt(end) * picture + math.sqrt(1 - end) * prediction

    def _at(self, timesteps: Tensor, like: Tensor) -> Tensor:
        """Abar at timesteps, float [n, 1, 1, 1]; between two of them sigma = sqrt(1 / abar - 1) is linear.

        It is in float32 at least, as 1 - abar would be wrong in half precision.
        """
        alphas = self.alphas.to(like.device, at_least_float32(like.dtype))
        low, high = timesteps.floor().long(), timesteps.ceil().long()
        found = alphas[low]
        if timesteps.is_floating_point():
            sigmas = ((1 - alphas) / alphas).sqrt()
            sigma = torch.lerp(sigmas[low], sigmas[high], (timesteps - low).to(alphas.dtype))
            found = torch.where(low == high, found, 1 / (1 + sigma.square()))
        return found.reshape(-1, 1, 1, 1)
