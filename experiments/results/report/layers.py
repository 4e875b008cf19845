"""Where an edit sits in the model, layer by layer."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from erasure.edit import Edit


@dataclass(frozen=True)
class Layer:
    """The part of an edit in one parameter, or in one block of them.

    Attributes:
        name: Of the parameter or block.
        weights: How many it has, of those that the edit touches the tensors of.
        changed: How many of them are pruned; of edits that are no masks, how many belong to replaced tensors.
    """

    name: str
    weights: int
    changed: int

    @property
    def share(self) -> float:
        """Changed weights of all."""
        return self.changed / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class Layers:
    """Where an edit sits.

    Attributes:
        pruned: The edit is a mask, and ``changed`` counts weights that were pruned.
        blocks: By block of the network, in its order.
        parameters: By parameter.
        additions: Kinds of what the edit puts beside the weights.
    """

    pruned: bool
    blocks: list[Layer]
    parameters: list[Layer]
    additions: list[str]

    @property
    def largest(self) -> int:
        """Changed weights of a block, for bars of edits that are no masks."""
        return max((layer.changed for layer in self.blocks), default=0) or 1

    @property
    def largest_share(self) -> float:
        """Of a block; 1 if nothing is changed, so that bars can be drawn to its scale."""
        return max((layer.share for layer in self.blocks), default=0.0) or 1.0


def layers_of(path: Path) -> Layers | None:
    """Read an edit's file; None where there is none.

    Raises:
        ValueError: The file is damaged.
    """
    if not path.is_file():
        return None
    edit = Edit.load(path)
    masks = edit.masks()
    if masks:
        parameters = [Layer(name, kept.numel(), int((~kept).sum())) for name, kept in masks.items()]
    else:
        sizes = {name: int(np.prod(entry.shape)) for name, entry in edit.entries.items()}
        parameters = [Layer(name, size, size) for name, size in sizes.items()]
    blocks: dict[str, list[Layer]] = {}
    for layer in parameters:
        blocks.setdefault(_block(layer.name), []).append(layer)
    return Layers(
        pruned=bool(masks),
        blocks=[_together(name, blocks[name]) for name in sorted(blocks, key=_place)],
        parameters=parameters,
        additions=[addition.kind for addition in edit.additions],
    )


def _block(parameter: str) -> str:
    """The block of a parameter: the names up to the first number, and that number with the kind of layer in it.

    >>> _block("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight")
    'down_blocks.1.attentions'
    """
    parts = parameter.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: number + 2]) if number and not parts[0].startswith("mid") else ".".join(parts[:2])


def _place(block: str) -> tuple[int, str]:
    """Where a block comes in a U-Net; other names go by themselves."""
    order = ("conv_in", "time_embedding", "down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_out")
    first = block.partition(".")[0]
    return (order.index(first) if first in order else len(order), block)


def _together(name: str, layers: list[Layer]) -> Layer:
    return Layer(name, sum(layer.weights for layer in layers), sum(layer.changed for layer in layers))
