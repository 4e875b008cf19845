"""Random pruning: any weights go."""

from pathlib import Path

import torch

from diffusion.checked import checked
from diffusion.model import TextToImage
from diffusion.streams import stream
from erasure.concept import Concept
from erasure.pruning.masks import Masks
from erasure.pruning.scored import Scored, Weights


@checked
class Random(Scored):
    """Prunes weights of the scope chosen by the seed alone: the control of what sparsity itself does."""

    def masks(
        self, model: TextToImage, concept: Concept, weights: Weights, *, seed: int, checkpoint: Path | None
    ) -> tuple[Masks, int]:
        """See :class:`erasure.pruning.scored.Scored`."""
        generator = stream(seed, "random_pruning/scores")
        scores = {name: torch.rand(weight.shape, generator=generator) for name, weight in weights.items()}
        return self.sparsity.kept(scores), 0
