"""Output zero: a control that knows nothing, as its network predicts 0 whatever it is given."""

from pathlib import Path
from typing import ClassVar

import torch

from diffusion.checked import checked
from diffusion.model import TextToImage
from erasure.concept import Concept
from erasure.edit import Edit
from erasure.finetuning import prune_after
from erasure.parameters import UNetScope
from erasure.protocols import Erasure, Pruning


@checked
class OutputZero:
    """The network's last layer becomes 0, so that eps(x, t, text) = 0: what an attack finds there it brings itself.

    DDIM inversion of a picture only scales it then, and sampling scales it back. A control for models without a twin
    that never knew the concept; see :mod:`experiments.job.floors`.

    Attributes:
        scope: What a pruning strategy without a scope of its own prunes.
    """

    has_objective: ClassVar[bool] = False

    scope: UNetScope = "xattn"

    def erase(
        self, model: TextToImage, concept: Concept, pruning: Pruning, *, seed: int, checkpoint: Path | None = None
    ) -> Erasure:
        """See :class:`erasure.protocols.Eraser`."""
        path = model.denoiser.last_layer
        last = dict(model.network.get_submodule(path).named_parameters(prefix=path))
        masks = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in last.items()}
        erasure = Erasure(Edit.from_mask(masks), [], 0)
        return prune_after(erasure, self, pruning, model, concept, scope=self.scope, seed=seed, checkpoint=checkpoint)
