"""Random weights: a control that knows nothing, as its U-Net was never trained."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from diffusion.checked import checked
from diffusion.model import TextToImage
from diffusion.streams import stream
from erasure.concept import Concept
from erasure.edit import Edit
from erasure.finetuning import prune_after
from erasure.parameters import UNetScope
from erasure.protocols import Erasure, Pruning


@checked
class RandomWeights:
    """Every parameter of the U-Net becomes what its layer starts a training with.

    Weights and biases of linear layers and convolutions are uniform within 1 / sqrt(fan in) of 0, those of norms are 1
    and 0. TINA+ (arXiv 2608.17747) has this control. For models without a twin that never knew the concept; see
    :mod:`experiments.job.floors`. The edit is as large as the U-Net.

    Attributes:
        scope: What a pruning strategy without a scope of its own prunes.
    """

    has_objective: ClassVar[bool] = False

    scope: UNetScope = "xattn"

    def erase(
        self, model: TextToImage, concept: Concept, pruning: Pruning, *, seed: int, checkpoint: Path | None = None
    ) -> Erasure:
        """See :class:`erasure.protocols.Eraser`."""
        before = dict(model.unet.named_parameters())
        after = {name: value.to(before[name]) for name, value in _initial(model.unet, seed)}
        erasure = Erasure(Edit.from_weights(before, after), [], 0)
        return prune_after(erasure, self, pruning, model, concept, scope=self.scope, seed=seed, checkpoint=checkpoint)


def _initial(unet: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
    """What the parameters start with, on the CPU, by name."""
    for path, module in unet.named_modules():
        own = dict(module.named_parameters(recurse=False))
        weight = own.get("weight")
        # Kernels have their outputs first; all else feeds one output.
        bound = weight[0].numel() ** -0.5 if weight is not None and weight.ndim > 1 else None
        for name, value in own.items():
            full = f"{path}.{name}" if path else name
            if bound is None:
                yield full, torch.full(value.shape, 1.0 if name == "weight" else 0.0)
            else:
                draws = torch.rand(value.shape, generator=stream(seed, "random_weights/parameter", full))
                yield full, bound * (2 * draws - 1)
