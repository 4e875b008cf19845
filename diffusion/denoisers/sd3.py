"""The transformers of Stable Diffusion 3 and 3.5: text and picture in one sequence (Esser et al., ICML 2024)."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from diffusion.denoisers.attention import Side, TextAttention
from diffusion.denoisers.joint import DOORS, GROUPS, refuse_cross_attention
from diffusion.denoisers.protocol import GuidanceKind, TextScope


@dataclass(frozen=True)
class SD3Denoiser:
    """A transformer of Stable Diffusion 3; see :class:`diffusion.denoisers.protocol.Denoiser`.

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

    def with_network(self, network: nn.Module) -> "SD3Denoiser":
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

    def evaluate(
        self, latents: Tensor, timesteps: Tensor, text: Tensor, pooled: Tensor | None, guidance: Tensor
    ) -> Tensor:
        """See :meth:`diffusion.denoisers.protocol.Denoiser.evaluate`."""
        return self.network(  # type: ignore[no-any-return]
            hidden_states=latents, timestep=timesteps, encoder_hidden_states=text, pooled_projections=pooled
        ).sample

    def watch_text_attention(self, attention: TextAttention, hooks: ExitStack) -> None:
        """See :meth:`diffusion.denoisers.protocol.Denoiser.watch_text_attention`; of the joint attention."""
        for block in self.network.transformer_blocks:
            layer = block.attn
            sides: dict[Side, nn.Module] = {
                "query": layer.to_q if layer.norm_q is None else layer.norm_q,
                "text_key": layer.add_k_proj if layer.norm_added_k is None else layer.norm_added_k,
                "image_key": layer.to_k if layer.norm_k is None else layer.norm_k,
            }
            attention.watch(sides, hooks, heads=layer.heads, scale=layer.scale)

    def text_attention(self) -> dict[str, Any]:
        """See :meth:`diffusion.denoisers.protocol.Denoiser.text_attention`.

        Raises:
            ValueError: Always.
        """
        refuse_cross_attention()
