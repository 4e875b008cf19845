"""Adapters: small layers behind cross-attention that add to what it puts out."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusion.model import TextToImage
from erasure.addition import Addition

PARTS = ("down.weight", "down.bias", "up.weight", "up.bias")
"""D float [rank, width], a float [rank], U float [width, rank] and b float [width] of a layer's adapter."""


@dataclass(frozen=True, eq=False)
class Adapters(Addition):
    """What Receler adds to a model: a layer of cross-attention that put out h puts out h + U GELU(D h + a) + b.

    h is float [n, pixels, width]; the text acts through it alone. Edits with adapters may be applied one after the
    other; an adapter that comes later sees what those before it have added.

    Attributes:
        weights: A layer's :data:`PARTS` under its name in the U-Net, as ``mid_block...attn2.down.weight``.
    """

    kind: ClassVar[str] = "adapters"

    weights: Mapping[str, Tensor]

    @classmethod
    def untrained(cls, model: TextToImage, rank: int, generator: torch.Generator) -> Self:
        """Adapters of ``rank`` for every cross-attention layer; U and b are zero, so that they add nothing yet.

        D and a are uniform in -1 / sqrt(width) .. 1 / sqrt(width).
        """
        weights: dict[str, Tensor] = {}
        for name, width in layer_widths(model).items():
            bound = width**-0.5
            down = torch.empty((rank, width + 1)).uniform_(-bound, bound, generator=generator)
            parts = (down[:, :width], down[:, width], torch.zeros(width, rank), torch.zeros(width))
            for part, value in zip(PARTS, parts, strict=True):
                weights[f"{name}.{part}"] = value.to(model.device, model.dtype, copy=True)
        return cls(weights)

    @property
    def layers(self) -> dict[str, tuple[Tensor, ...]]:
        """The :data:`PARTS` of every layer by its name.

        Raises:
            ValueError: A layer lacks some or has others, or their shapes do not go together.
        """
        layers: dict[str, dict[str, Tensor]] = {}
        for name, value in self.weights.items():
            layer, matrix, kind = name.rsplit(".", 2)
            layers.setdefault(layer, {})[f"{matrix}.{kind}"] = value
        for layer, parts in layers.items():
            if parts.keys() != {*PARTS}:
                raise ValueError(
                    f"the adapter of {layer!r} consists of {', '.join(parts)}; it must be {', '.join(PARTS)}."
                )
            shapes = [list(parts[part].shape) for part in PARTS]
            rank, width = parts["down.bias"].numel(), parts["up.bias"].numel()
            if shapes != [[rank, width], [rank], [width, rank], [width]]:
                raise ValueError(
                    f"the shapes {', '.join(map(str, shapes))} of the adapter of {layer!r} do not go together."
                )
        return {layer: tuple(parts[part] for part in PARTS) for layer, parts in layers.items()}

    def settings(self) -> dict[str, Any]:
        """See :class:`erasure.addition.Addition`."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`erasure.addition.Addition`."""
        return dict(self.weights)

    @classmethod
    def restored(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """See :class:`erasure.addition.Addition`."""
        adapters = cls(dict(tensors), **settings)
        if not adapters.layers:
            raise ValueError("the edit holds no adapters.")
        return adapters

    def attach(self, model: TextToImage) -> Callable[[], None]:
        """See :class:`erasure.addition.Addition`."""
        return AdaptersAtWork(self, model).detach


class AdaptersAtWork:
    """Adapters in a model, which training can silence, fix and listen to.

    Args:
        adapters: Whose tensors are used as they are if the model has their precision and device, so that gradients
            flow into them.
        model: Which they are put into.

    Raises:
        ValueError: The model has not the layers that they are for.
    """

    def __init__(self, adapters: Adapters, model: TextToImage) -> None:
        self._silent = False
        self._fixed = False
        self._heard: dict[str, Tensor] | None = None
        layers, widths = adapters.layers, layer_widths(model)
        for name, (down, *_) in layers.items():
            if widths.get(name) != down.shape[1]:
                raise ValueError(
                    f"The adapters were made for cross-attention {name!r} of width {down.shape[1]} and {model.name!r} "
                    "has no such layer; load the model that they were made from."
                )
        with ExitStack() as hooks:
            for name, parts in layers.items():
                layer = model.network.get_submodule(name)
                ready = [part.to(model.device, model.dtype) for part in parts]
                hooks.callback(layer.register_forward_hook(self._hook(name, ready)).remove)
            self.detach: Callable[[], None] = hooks.pop_all().close

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """Let the model compute as if they were not there, for the length of the context."""
        self._silent = True
        try:
            yield
        finally:
            self._silent = False

    @contextmanager
    def fixed(self) -> Iterator[None]:
        """Keep no graph to their tensors for the length of the context."""
        self._fixed = True
        try:
            yield
        finally:
            self._fixed = False

    @contextmanager
    def heard(self) -> Iterator[dict[str, Tensor]]:
        """What each adds in the last evaluation within the context, by layer, float [n, pixels, width]."""
        heard: dict[str, Tensor] = {}
        self._heard = heard
        try:
            yield heard
        finally:
            self._heard = None

    def _hook(self, name: str, parts: list[Tensor]) -> Callable[[nn.Module, object, Tensor], Tensor]:
        def hook(_layer: nn.Module, _inputs: object, output: Tensor) -> Tensor:
            if self._silent:
                return output
            down, down_bias, up, up_bias = (part.detach() for part in parts) if self._fixed else parts
            added = functional.linear(functional.gelu(functional.linear(output, down, down_bias)), up, up_bias)
            if self._heard is not None:
                self._heard[name] = added
            return output + added

        return hook


def layer_widths(model: TextToImage) -> dict[str, int]:
    """How many numbers each cross-attention layer puts out for a pixel, by its name in the network.

    Raises:
        ValueError: The network has no such layers.
    """
    return {name: int(layer.to_out[0].out_features) for name, layer in model.denoiser.text_attention().items()}
