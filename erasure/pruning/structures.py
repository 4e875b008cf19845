"""Which weights of a scope are pruned together: single weights, neurons or attention heads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import Tensor, nn

from diffusion.model import TextToImage

Granularity = Literal["weight", "neuron", "head"]
"""What is pruned as a whole, of what the scope covers.

- ``weight``: a single weight.
- ``neuron``: a hidden unit of a feed-forward (the rows of its value and its gate in ``net.0.proj`` and its column of
  ``net.2``), an inner channel of an attention (its row of ``to_q``, ``to_k`` and ``to_v`` and its column of
  ``to_out.0``; where text has projections of its own, theirs as well), an output channel (row) of any other layer.
- ``head``: the same, but all inner channels of an attention's head together.
"""

_INTO_HEADS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
_OUT_OF_HEADS = ("to_out.0", "to_add_out")


@dataclass(frozen=True)
class Structure:
    """The units of a scope's matrices and kernels.

    Attributes:
        units: How many units a group has, by the group's name.
        places: By parameter name, its group and the unit of each weight there, int64 that broadcasts to the
            parameter's shape; None where units are the weights themselves.
        sizes: Weights of each unit by group, int64 [units].
    """

    units: dict[str, tuple[int, ...]]
    places: dict[str, tuple[str, Tensor | None]]
    sizes: dict[str, Tensor] | None

    def by_weight(self, values: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values of units as values of weights, by parameter name; differentiable in ``values``."""
        return {
            name: values[group] if units is None else values[group][units].expand(weights[name].shape)
            for name, (group, units) in self.places.items()
        }


def structure_of(model: TextToImage, weights: Mapping[str, Tensor], granularity: Granularity) -> Structure:
    """The units of ``weights``, the U-Net's matrices and kernels by parameter name."""
    if granularity == "weight":
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        return Structure(shapes, {name: (name, None) for name in weights}, None)
    places: dict[str, tuple[str, Tensor | None]] = {}
    sizes: dict[str, Tensor] = {}
    for name, weight in weights.items():
        group, units = _units_of(model.network, name, weight, granularity)
        every = units.expand(weight.shape)
        counts = torch.bincount(every.reshape(-1))
        sizes[group] = sizes[group] + counts if group in sizes else counts
        places[name] = group, units
    return Structure({group: (len(counts),) for group, counts in sizes.items()}, places, sizes)


def _units_of(unet: nn.Module, name: str, weight: Tensor, granularity: Granularity) -> tuple[str, Tensor]:
    """The group of a parameter, and the unit of each of its weights, int64 that broadcasts to its shape."""
    rows, columns = (torch.arange(size, device=weight.device) for size in weight.shape[:2])
    path = name.removesuffix(".weight")
    for leaf in (*_INTO_HEADS, *_OUT_OF_HEADS, "net.0.proj", "net.2"):
        owner = path.removesuffix(f".{leaf}")
        if owner == path:
            continue
        module = unet.get_submodule(owner)
        if isinstance(module, Attention | FluxAttention):
            inner = columns[None] if leaf in _OUT_OF_HEADS else rows[:, None]
            width = inner.numel() // module.heads
            return owner, inner // width if granularity == "head" else inner
        if isinstance(module, FeedForward):
            hidden = module.net[2].in_features
            # Of a GEGLU, the values' rows come first and the gates' after them.
            return owner, columns[None] if leaf == "net.2" else rows[:, None] % hidden
    return name, rows.reshape(-1, *[1] * (weight.ndim - 1))
