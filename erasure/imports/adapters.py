"""Adapters behind cross-attention, as Receler's authors publish them."""

from pathlib import Path

from diffusion.model import TextToImage
from erasure.additions.adapters import Adapters, layer_widths
from erasure.edit import Edit
from erasure.imports.dense import require_finite
from erasure.imports.reading import Weights, examples


def adapters_edit(path: Path, weights: Weights, model: TextToImage) -> Edit:
    """Adapters by the names of our layers; a published one goes by the name of the block around it.

    Raises:
        ValueError: They do not fit the model.
    """
    widths = layer_widths(model)
    named: Weights = {}
    for key, tensor in weights.items():
        block, matrix, kind = key.rsplit(".", 2)
        within = [name for name in widths if f"{name}.".startswith(f"{block}.")]
        name = f"{within[0]}.{matrix}.{kind}" if len(within) == 1 else key
        named[key if name in named else name] = tensor
    require_finite(path, named)
    adapters = Adapters(named)
    try:
        if lacking := [f"{name!r}" for name in widths if name not in adapters.layers]:
            raise ValueError(f"adapters are lacking for {examples(lacking, len(widths))}.")
        adapters.attach(model)()
    except ValueError as error:
        raise ValueError(f"{path} does not fit {model.name!r}: {error}") from error
    return Edit({}, {}, (adapters,))
