"""The U-Nets of Stable Diffusion 1, 2 and XL."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffusion.denoisers.attention import Side, TextAttention
from diffusion.denoisers.protocol import Doors, GuidanceKind, ParameterGroups, TextScope


def _is_linear_or_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d)


GROUPS: ParameterGroups = {
    "xattn": lambda name, module: ".attn2." in name,
    "xattn_kv": lambda name, module: ".attn2.to_k." in name or ".attn2.to_v." in name,
    "selfattn": lambda name, module: ".attn1." in name,
    "attn": lambda name, module: ".attn1." in name or ".attn2." in name,
    "ffn": lambda name, module: ".ff." in name,
    "ffn2": lambda name, module: name.endswith(".ff.net.2.weight"),
    "xattn_ffn": lambda name, module: ".attn2." in name or ".ff." in name,
    "noxattn": lambda name, module: (
        ".attn2." not in name and not name.startswith(("time_embedding.", "conv_norm_out.", "conv_out."))
    ),
    "esd_u": lambda name, module: _is_linear_or_conv(module) and ".attn2." not in name,
    "transformers": lambda name, module: (
        _is_linear_or_conv(module) and name.endswith(".weight") and ".attentions." in name
    ),
    "linear_conv": lambda name, module: _is_linear_or_conv(module) and name.endswith(".weight"),
    "full": lambda name, module: True,
}

DOORS: Doors = {"rows": GROUPS["xattn_kv"]}
"""Every cross-attention reads the text anew."""


@dataclass(frozen=True)
class UNetDenoiser:
    """A U-Net; see :class:`diffusion.denoisers.protocol.Denoiser`.

    Attributes:
        network: The U-Net.
        pixels_per_latent: Of an edge.
    """

    network: Any
    pixels_per_latent: int

    kind = "U-Net"
    part = "unet"
    last_layer = "conv_out"
    groups = GROUPS
    doors = DOORS
    text_scope: ClassVar[TextScope] = "xattn_kv"
    largest = None

    def with_network(self, network: nn.Module) -> "UNetDenoiser":
        """The same with another network."""
        return replace(self, network=network)

    @property
    def guidance(self) -> GuidanceKind:
        """See :attr:`diffusion.denoisers.protocol.Denoiser.guidance`."""
        return "classifier_free"

    @property
    def channels(self) -> int:
        """Of the latents."""
        return int(self.network.config.in_channels)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the latents that it was trained on."""
        size = self.network.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height, width

    @property
    def multiple(self) -> int:
        """It halves its latents at every level but the last."""
        return int(2 ** (len(self.network.config.block_out_channels) - 1))

    def tokens(self, height: int, width: int) -> int:
        """Pixels of the latents."""
        return height * width

    def evaluate(
        self, latents: Tensor, timesteps: Tensor, text: Tensor, pooled: Tensor | None, guidance: Tensor
    ) -> Tensor:
        """See :meth:`diffusion.denoisers.protocol.Denoiser.evaluate`; with ``pooled`` as Stable Diffusion XL has it."""
        if pooled is None:
            return self.network(latents, timesteps, text).sample  # type: ignore[no-any-return]
        # Original size, upper left corner of the crop, and size of the picture: a whole one of the size asked for.
        size = [self.pixels_per_latent * edge for edge in latents.shape[2:]]
        time_ids = torch.tensor([*size, 0, 0, *size], dtype=text.dtype, device=text.device).expand(len(text), -1)
        added = {"text_embeds": pooled, "time_ids": time_ids}
        return self.network(latents, timesteps, text, added_cond_kwargs=added).sample  # type: ignore[no-any-return]

    def watch_text_attention(self, attention: TextAttention, hooks: ExitStack) -> None:
        """See :meth:`diffusion.denoisers.protocol.Denoiser.watch_text_attention`."""
        for layer in self.text_attention().values():
            sides: dict[Side, nn.Module] = {"query": layer.to_q, "text_key": layer.to_k}
            attention.watch(sides, hooks, heads=layer.heads, scale=layer.scale)

    def text_attention(self) -> dict[str, Any]:
        """Its cross-attention layers."""
        return {name: layer for name, layer in self.network.named_modules() if name.endswith(".attn2")}
