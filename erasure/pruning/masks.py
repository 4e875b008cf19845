"""What pruning strategies share: which parameters a mask covers, and cutting those that score lowest."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from diffusion.model import TextToImage
from erasure.edit import Edit
from erasure.parameters import UNetScope, scope_parameters
from erasure.protocols import Erasure


def maskable_parameters(model: TextToImage, scope: UNetScope) -> dict[str, nn.Parameter]:
    """Matrices and kernels of the scope; biases and norms are never masked."""
    return {name: value for name, value in scope_parameters(model, scope).items() if value.ndim >= 2}


def cut_lowest(
    scores: Mapping[str, Tensor], count: int, candidates: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Masks that prune the ``count`` weights of the lowest scores over all tensors; ties go to the lower index.

    Args:
        scores: float tensors by parameter name.
        count: How many to prune; fewer if there are fewer candidates.
        candidates: bool tensors by parameter name, which weights may be pruned; all by default.

    Returns:
        bool tensors of the same shapes, True where the weight is kept.
    """
    flat = torch.cat([values.detach().reshape(-1) for values in scores.values()])
    allowed = (
        torch.arange(len(flat), device=flat.device)
        if candidates is None
        else torch.cat([candidates[name].reshape(-1) for name in scores]).nonzero().reshape(-1)
    )
    kept = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
    kept[allowed[flat[allowed].argsort(stable=True)[:count]]] = False
    sizes = [values.numel() for values in scores.values()]
    return {
        name: part.reshape(values.shape) for (name, values), part in zip(scores.items(), kept.split(sizes), strict=True)
    }


def prune_fraction(scores: Mapping[str, Tensor], fraction: float, scope: UNetScope) -> Erasure:
    """Prune the ``fraction`` of the weights that scores lowest, which costs no U-Net evaluation.

    Args:
        scores: float tensors by parameter name, of the parameters' shapes.
        fraction: 0 .. 1, of all weights together, rounded down.
        scope: Where the weights come from, for the edit's metadata.
    """
    masks = cut_lowest(scores, math.floor(fraction * sum(values.numel() for values in scores.values())))
    return Erasure(Edit.from_mask(masks, {"scope": scope, **mask_counts(masks)}), [], 0)


def mask_counts(masks: Mapping[str, Tensor]) -> dict[str, int]:
    """How many weights the masks cover and how many they prune, for an edit's metadata."""
    return {
        "maskable_weights": sum(kept.numel() for kept in masks.values()),
        "pruned_weights": sum(int((~kept).sum()) for kept in masks.values()),
    }
