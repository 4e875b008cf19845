"""The autoencoder between pictures and the latents that a model denoises."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from diffusion.finite import overflow_remedy, require_finite
from diffusion.memory import visiting


class Autoencoder:
    """A VAE with the scale and shift that its latents are denoised in: (latents of the VAE - shift) * scale.

    Args:
        vae: The VAE; used, not copied.
        name: What errors call the model.
        offload: It waits on the CPU while it is not used.

    Raises:
        ValueError: It shifts every channel by a number of its own.
    """

    def __init__(self, vae: Any, name: str, *, offload: bool) -> None:
        if getattr(vae.config, "latents_mean", None) is not None:
            raise ValueError(f"The VAE of {name!r} shifts its latents (latents_mean), which is not supported.")
        self.vae = vae
        self.name = name
        self.offload = offload
        self._scale = float(vae.config.scaling_factor)
        self._shift = float(getattr(vae.config, "shift_factor", None) or 0.0)
        if offload:
            vae.to("cpu")

    @property
    def channels(self) -> int:
        """Of the latents."""
        return int(self.vae.config.latent_channels)

    @property
    def pixels_per_latent(self) -> int:
        """Of an edge."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def decode(self, latents: Tensor, device: torch.device) -> Tensor:
        """Pictures of latents float [n, c, h, w]; uint8 [n, 3, H, W], on the CPU.

        Raises:
            NotFiniteError: The decoder gives infinite or NaN pixels.
        """
        scaled = latents.to(self.vae.dtype) / self._scale
        with self._using(device):
            decoded: Tensor = self.vae.decode(scaled + self._shift if self._shift else scaled).sample.float()
        require_finite(decoded, f"Pictures that the VAE of {self.name!r} decodes", self._remedy)
        return ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()

    def encode(self, images: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Latents (posterior means, scaled) of uint8 images [n, 3, H, W]; float [n, c, h, w].

        Raises:
            NotFiniteError: The encoder gives infinite or NaN latents.
        """
        pixels = images.to(device).float() / 127.5 - 1
        with self._using(device):
            mean: Tensor = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mean
        latents = ((mean - self._shift if self._shift else mean) * self._scale).to(device, dtype)
        require_finite(latents, f"Latents that the VAE of {self.name!r} encodes pictures to", self._remedy)
        return latents

    def _using(self, device: torch.device) -> AbstractContextManager[None]:
        return visiting(self.vae, device) if self.offload else nullcontext()

    @property
    def _remedy(self) -> str:
        return overflow_remedy(self.vae.dtype, "a weight of the VAE is damaged or too large")
