"""No pruning."""

from pathlib import Path
from typing import ClassVar

from diffusion.checked import checked
from diffusion.model import TextToImage
from erasure.concept import Concept
from erasure.edit import Edit
from erasure.parameters import UNetScope
from erasure.protocols import Erasure, Objective


@checked
class Off:
    """Leaves the erased model as it is."""

    needs_objective: ClassVar[bool] = False

    def prune(
        self,
        model: TextToImage,
        concept: Concept,
        objective: Objective | None,
        *,
        scope: UNetScope,
        seed: int,
        checkpoint: Path | None,
    ) -> Erasure:
        """See :class:`erasure.protocols.Pruning`."""
        return Erasure(Edit.identity(), [], 0)
