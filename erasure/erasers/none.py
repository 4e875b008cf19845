"""No erasing: pruning alone, or the unedited model."""

from pathlib import Path
from typing import ClassVar

from diffusion.checked import checked
from diffusion.model import TextToImage
from erasure.concept import Concept
from erasure.edit import Edit
from erasure.finetuning import prune_after
from erasure.parameters import UNetScope
from erasure.protocols import Erasure, Pruning


@checked
class NoEraser:
    """Leaves the model to the pruning strategy.

    Attributes:
        scope: What a pruning strategy without a scope of its own prunes.
    """

    has_objective: ClassVar[bool] = False

    scope: UNetScope = "xattn"

    def erase(
        self, model: TextToImage, concept: Concept, pruning: Pruning, *, seed: int, checkpoint: Path | None = None
    ) -> Erasure:
        """See :class:`erasure.protocols.Eraser`."""
        nothing = Erasure(Edit.identity(), [], 0)
        return prune_after(nothing, self, pruning, model, concept, scope=self.scope, seed=seed, checkpoint=checkpoint)
