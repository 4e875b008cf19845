"""The transformers of FLUX.1: joint blocks, and single ones in which text and picture share all weights."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusion.denoisers.attention import TextAttention
from diffusion.denoisers.joint import DOORS, GROUPS, refuse_cross_attention
from diffusion.denoisers.protocol import GuidanceKind, TextScope

PATCH = 2
"""Edge of the squares of latents that are one position."""

TIMES = 1000
"""Timesteps, of which the network is given the share."""


@dataclass(frozen=True)
class FluxDenoiser:
    """A transformer of FLUX.1; see :class:`diffusion.denoisers.protocol.Denoiser`.

    Attributes:
        network: The transformer.
    """

    network: Any

    kind = "transformer"
    part = "transformer"
    last_layer = "proj_out"
    groups = GROUPS
    doors = DOORS
    text_scope: ClassVar[TextScope] = "text_projection"
    multiple = PATCH
    largest = None
    size = (128, 128)

    def with_network(self, network: nn.Module) -> "FluxDenoiser":
        """The same with another network."""
        return replace(self, network=network)

    @property
    def guidance(self) -> GuidanceKind:
        """Embedded in FLUX.1-dev; FLUX.1-schnell takes none."""
        return "embedded" if self.network.config.guidance_embeds else "none"

    @property
    def channels(self) -> int:
        """Of the latents; a position has those of a square."""
        return int(self.network.config.in_channels // PATCH**2)

    def tokens(self, height: int, width: int) -> int:
        """Squares of the latents."""
        return (height // PATCH) * (width // PATCH)

    def evaluate(
        self, latents: Tensor, timesteps: Tensor, text: Tensor, pooled: Tensor | None, guidance: Tensor
    ) -> Tensor:
        """See :meth:`diffusion.denoisers.protocol.Denoiser.evaluate`."""
        height, width = latents.shape[2] // PATCH, latents.shape[3] // PATCH
        rows, columns = (torch.arange(edge, device=latents.device) for edge in (height, width))
        places = functional.pad(torch.cartesian_prod(rows, columns).to(latents.dtype), (1, 0))
        output = self.network(
            hidden_states=packed(latents),
            timestep=timesteps.to(latents.dtype) / TIMES,
            guidance=guidance.float() if self.guidance == "embedded" else None,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            img_ids=places,
            txt_ids=places.new_zeros((text.shape[1], 3)),
        ).sample
        return unpacked(output, height, width)

    def watch_text_attention(self, attention: TextAttention, hooks: ExitStack) -> None:
        """See :meth:`diffusion.denoisers.protocol.Denoiser.watch_text_attention`.

        Raises:
            ValueError: Always.
        """
        raise ValueError("The attention of FLUX turns queries and keys by their places after all that can be recorded.")

    def text_attention(self) -> dict[str, Any]:
        """See :meth:`diffusion.denoisers.protocol.Denoiser.text_attention`.

        Raises:
            ValueError: Always.
        """
        refuse_cross_attention()


def packed(latents: Tensor) -> Tensor:
    """Latents float [n, c, h, w] as a sequence of squares, float [n, h/2 * w/2, 4 c]."""
    n, c, h, w = latents.shape
    squares = latents.reshape(n, c, h // PATCH, PATCH, w // PATCH, PATCH)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(n, -1, c * PATCH**2)


def unpacked(squares: Tensor, height: int, width: int) -> Tensor:
    """The reverse of :func:`packed` for so many rows and columns of squares."""
    n, _, channels = squares.shape
    latents = squares.reshape(n, height, width, channels // PATCH**2, PATCH, PATCH)
    return latents.permute(0, 3, 1, 4, 2, 5).reshape(n, -1, height * PATCH, width * PATCH)
