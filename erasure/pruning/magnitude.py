"""Magnitude pruning: the smallest weights go."""

from pathlib import Path

from diffusion.checked import checked
from diffusion.model import TextToImage
from erasure.concept import Concept
from erasure.pruning.masks import Masks
from erasure.pruning.scored import Scored, Weights


@checked
class Magnitude(Scored):
    """Prunes the weights of the smallest |W|, whatever the concept: a control."""

    def masks(
        self, model: TextToImage, concept: Concept, weights: Weights, *, seed: int, checkpoint: Path | None
    ) -> tuple[Masks, int]:
        """See :class:`erasure.pruning.scored.Scored`."""
        return self.sparsity.kept({name: weight.abs() for name, weight in weights.items()}), 0
