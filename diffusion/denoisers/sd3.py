"""The transformers of Stable Diffusion 3 and 3.5: text and picture in one sequence (Esser et al., ICML 2024)."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from diffusion.denoisers.protocol import ParameterGroups

_TEXT_KEYS = (".attn.add_k_proj.", ".attn.add_v_proj.")
_TEXT = (*_TEXT_KEYS, ".attn.add_q_proj.", ".attn.to_add_out.")
_IMAGE_KEYS = (".attn.to_k.", ".attn.to_v.")
# The second attention of Stable Diffusion 3.5 medium is called as a U-Net's cross-attention is, and sees no text.
_IMAGE = (*_IMAGE_KEYS, ".attn.to_q.", ".attn.to_out.", *(f".attn2.to_{side}." for side in ("q", "k", "v", "out")))
_BLOCKS = "transformer_blocks."


def _has(name: str, parts: tuple[str, ...]) -> bool:
    return any(part in name for part in parts)


def _is_linear_or_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d)


GROUPS: ParameterGroups = {
    "xattn": lambda name, module: _has(name, _TEXT),
    "xattn_kv": lambda name, module: _has(name, _TEXT_KEYS),
    "selfattn": lambda name, module: _has(name, _IMAGE),
    "attn": lambda name, module: _has(name, (*_TEXT, *_IMAGE)),
    "attn_kv": lambda name, module: _has(name, (*_IMAGE_KEYS, ".attn2.to_k.", ".attn2.to_v.")),
    "ffn": lambda name, module: ".ff." in name,
    "ffn2": lambda name, module: name.endswith(".ff.net.2.weight"),
    "xattn_ffn": lambda name, module: _has(name, (*_TEXT, ".ff.")),
    "ffn_text": lambda name, module: ".ff_context." in name,
    "modulation": lambda name, module: name.startswith(_BLOCKS) and _has(name, (".norm1.", ".norm1_context.")),
    "text_projection": lambda name, module: name.startswith(("context_embedder.", "time_text_embed.text_embedder.")),
    "noxattn": lambda name, module: name.startswith(_BLOCKS) and not _has(name, _TEXT),
    "esd_u": lambda name, module: name.startswith(_BLOCKS) and _is_linear_or_conv(module) and not _has(name, _TEXT),
    "transformers": lambda name, module: (
        name.startswith(_BLOCKS) and _is_linear_or_conv(module) and name.endswith(".weight")
    ),
    "linear_conv": lambda name, module: _is_linear_or_conv(module) and name.endswith(".weight"),
    "full": lambda name, module: True,
}


@dataclass(frozen=True)
class SD3Denoiser:
    """A transformer of Stable Diffusion 3; see :class:`diffusion.denoisers.protocol.Denoiser`.

    Attributes:
        network: The transformer.
    """

    network: Any

    kind = "transformer"
    part = "transformer"
    groups = GROUPS

    def with_network(self, network: nn.Module) -> "SD3Denoiser":
        """The same with another network."""
        return replace(self, network=network)

    @property
    def channels(self) -> int:
        """Of the latents."""
        return int(self.network.config.in_channels)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the latents that it was trained on."""
        edge = int(self.network.config.sample_size)
        return edge, edge

    @property
    def multiple(self) -> int:
        """It sees its latents in patches."""
        return int(self.network.config.patch_size)

    @property
    def largest(self) -> int:
        """It has so many positions."""
        return int(self.network.config.pos_embed_max_size * self.network.config.patch_size)

    def tokens(self, height: int, width: int) -> int:
        """Patches of the latents."""
        return (height // self.multiple) * (width // self.multiple)

    def evaluate(self, latents: Tensor, timesteps: Tensor, text: Tensor, pooled: Tensor | None) -> Tensor:
        """See :meth:`diffusion.denoisers.protocol.Denoiser.evaluate`."""
        return self.network(  # type: ignore[no-any-return]
            hidden_states=latents, timestep=timesteps, encoder_hidden_states=text, pooled_projections=pooled
        ).sample

    def text_attention(self) -> dict[str, Any]:
        """See :meth:`diffusion.denoisers.protocol.Denoiser.text_attention`.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "A transformer of Stable Diffusion 3 has no cross-attention: text and picture attend to each other in one "
            "sequence; choose a method that trains weights, as eraser=esd, ac or salun."
        )
