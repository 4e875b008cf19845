"""Where a network looks at text while it denoises: recorded, differentiably and without changing what is computed."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffusion.precision import at_least_float32

Side = Literal["query", "text_key", "image_key"]
"""What a layer computes before its softmax; image keys where text shares the softmax with the picture."""


@dataclass(frozen=True)
class _Layer:
    heads: int
    scale: float
    query: Tensor
    text_key: Tensor
    image_key: Tensor | None = None


class TextAttention:
    """What the attention to text was, layer by layer in the order of the network's evaluations."""

    def __init__(self) -> None:
        self._layers: list[_Layer] = []

    def probabilities(self, pixels: int | None = None) -> Iterator[Tensor]:
        """softmax(scale q k^T) of every layer, float [n, heads, pixels, tokens].

        Rows sum to 1 in cross-attention. Where text and picture share the softmax it is taken over the keys of both,
        and the text's columns are what is left of it, which sum to less.

        Args:
            pixels: If given, only of the layers that look with so many.
        """
        for layer in self._layers:
            # Under autocast queries and keys are in half precision, which is too coarse for products and their softmax.
            q, k = (_by_head(rows, layer.heads) for rows in (layer.query, layer.text_key))
            if pixels is not None and q.shape[2] != pixels:
                continue
            tokens = k.shape[2]
            if layer.image_key is not None:
                k = torch.cat([k, _by_head(layer.image_key, layer.heads)], dim=2)
            yield (layer.scale * (q @ k.transpose(-1, -2))).softmax(-1)[..., :tokens]

    @property
    def layer_pixels(self) -> list[int]:
        """With how many pixels layers look, every number once, the largest first."""
        return sorted({layer.query.shape[-2] for layer in self._layers}, reverse=True)

    def watch(self, modules: Mapping[Side, nn.Module], hooks: ExitStack, *, heads: Any, scale: Any) -> None:
        """Keep what one layer computes until ``hooks`` closes.

        Args:
            modules: Whose outputs are its queries and keys, float [n, rows, heads * width] or [n, heads, rows, width].
            hooks: Closes when all has been seen.
            heads: Of the layer.
            scale: Of its products.
        """
        seen: dict[Side, Tensor] = {}

        def keep(side: Side, output: Tensor) -> None:
            seen[side] = output
            if seen.keys() == modules.keys():
                self._layers.append(_Layer(heads, scale, **seen))
                seen.clear()

        for side, module in modules.items():
            hook = module.register_forward_hook(lambda _module, _inputs, output, side=side: keep(side, output))
            hooks.callback(hook.remove)


def _by_head(rows: Tensor, heads: int) -> Tensor:
    rows = rows.to(at_least_float32(rows.dtype))
    return rows if rows.ndim == 4 else rows.unflatten(-1, (heads, -1)).transpose(1, 2)
