"""What pruning strategies share: which parameters a mask covers, cutting those that score lowest, and the edit."""

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from diffusion.checked import checked
from diffusion.model import TextToImage
from erasure.edit import Edit
from erasure.entries import Fill
from erasure.parameters import UNetScope, scope_parameters
from erasure.protocols import Erasure

Masks = dict[str, Tensor]
"""bool tensors by parameter name, True where the weight is kept."""


@checked
class Sparsity:
    """How many weights go, and which ones they are compared with: the part that every scored strategy has.

    Attributes:
        fraction: Of the weights that are compared with each other, those of the lowest scores; rounded down.
        per: The weights that are compared: ``global``, all of the scope; ``layer``, those of a matrix or kernel;
            ``row``, those that feed one output; or a number M, every M consecutive inputs of an output, so that
            fraction 0.5 per 4 is the 2:4 pattern. M must divide the inputs (a kernel's input channels).
    """

    fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    per: Literal["global", "layer", "row"] | Annotated[int, Field(ge=2)] = "global"

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Refuse weights whose inputs do not come in groups of M.

        Raises:
            ValueError: ``per`` is a number that does not divide a weight's inputs.
        """
        for name, weight in weights.items():
            if isinstance(self.per, int) and weight.shape[1] % self.per:
                raise ValueError(
                    f"sparsity.per is {self.per} and {name!r} has {weight.shape[1]} inputs; "
                    "choose a divisor of them, another scope, or 'global', 'layer' or 'row'."
                )

    def kept(self, scores: Mapping[str, Tensor]) -> Masks:
        """Masks that prune the lowest ``scores``, float by parameter name; ties go to the lower index."""
        if self.per == "global":
            return cut_lowest(scores, self._count(sum(values.numel() for values in scores.values())))
        return {name: self._kept_in(values.detach()) for name, values in scores.items()}

    def _kept_in(self, scores: Tensor) -> Tensor:
        if isinstance(self.per, int):
            # Inputs last, so that those of a kernel's one place lie side by side.
            inputs_last = scores.movedim(1, -1)
            kept = _lowest_cut(inputs_last.reshape(-1, self.per), self._count(self.per))
            return kept.reshape(inputs_last.shape).movedim(-1, 1)
        rows = scores.reshape(1, -1) if self.per == "layer" else scores.flatten(1)
        return _lowest_cut(rows, self._count(rows.shape[1])).reshape(scores.shape)

    def _count(self, size: int) -> int:
        # 0.29 of 100 is 29, although their product in floating point is below it.
        return math.floor(round(self.fraction * size, 6))


def maskable_parameters(model: TextToImage, scope: UNetScope) -> dict[str, nn.Parameter]:
    """Matrices and kernels of the scope; biases and norms are never masked."""
    return {name: value for name, value in scope_parameters(model, scope).items() if value.ndim >= 2}


def cut_lowest(scores: Mapping[str, Tensor], count: int, candidates: Mapping[str, Tensor] | None = None) -> Masks:
    """Masks that prune the ``count`` weights of the lowest scores over all tensors; ties go to the lower index.

    Args:
        scores: float tensors by parameter name.
        count: How many to prune; fewer if there are fewer candidates.
        candidates: bool tensors by parameter name, which weights may be pruned; all by default.
    """
    flat = torch.cat([values.detach().reshape(-1) for values in scores.values()])
    if candidates is None:
        kept = _lowest_cut(flat[None], count)[0]
    else:
        allowed = torch.cat([candidates[name].reshape(-1) for name in scores])
        kept = torch.ones_like(allowed)
        kept[allowed] = _lowest_cut(flat[allowed][None], count)[0]
    sizes = [values.numel() for values in scores.values()]
    return {
        name: part.reshape(values.shape) for (name, values), part in zip(scores.items(), kept.split(sizes), strict=True)
    }


def _lowest_cut(rows: Tensor, count: int) -> Tensor:
    """False at the ``count`` lowest of each row of float [n, m], the first of those that tie; bool [n, m]."""
    kept = torch.ones_like(rows, dtype=torch.bool)
    return kept.scatter_(1, rows.argsort(dim=1, stable=True)[:, :count], False)


def pruned_by(masks: Masks, *, scope: UNetScope, fill: Fill, seed: int, unet_evaluations: int = 0) -> Erasure:
    """The erasure that prunes what ``masks`` do not keep.

    Args:
        masks: Over matrices and kernels of the scope.
        scope: Where the weights come from, for the edit's metadata.
        fill: What pruned weights become.
        seed: Of fills that are drawn.
        unet_evaluations: What the masks have cost.
    """
    edit = Edit.from_mask(masks, {"scope": scope, **mask_counts(masks)}, fill=fill, seed=seed)
    return Erasure(edit, [], unet_evaluations)


def mask_counts(masks: Mapping[str, Tensor]) -> dict[str, int]:
    """How many weights the masks cover and how many they prune, for an edit's metadata."""
    return {
        "maskable_weights": sum(kept.numel() for kept in masks.values()),
        "pruned_weights": sum(int((~kept).sum()) for kept in masks.values()),
    }
