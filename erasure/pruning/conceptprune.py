"""ConceptPrune: the weights that a concept uses more than its absence go."""

from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field

from diffusion.checked import checked
from diffusion.model import TextToImage
from diffusion.streams import derived_seed
from erasure.concept import Concept
from erasure.parameters import UNetScope
from erasure.pictures import Painting
from erasure.pruning.calibration import input_squares, sizes_times_use, spread
from erasure.pruning.masks import Masks, Sparsity
from erasure.pruning.scored import Scored, Weights
from erasure.trajectories import stage


@checked
class ConceptPrune(Scored):
    """ConceptPrune (Chavhan et al., "Concept Editing in Diffusion Models via Skilled Neuron Pruning", ICLR 2025).

    At sampler step t, S^c_ij(t) = |W_ij| ||X^c_j(t)||_2 on pictures of the concept's prompts c, and S^b on the same
    with the anchor in the concept's place. X_j(t) are the values of input j at every position of every picture, both
    halves of guidance, each position's inputs divided by their norm. A weight is skilled at t if S^c is among the
    highest of its row and above S^b; the skilled weights of the first tau steps are pruned. Sampling ends there. The
    authors start every picture from the noise of seed 0; here every pair of pictures has noise of its own.

    Attributes:
        sparsity: How many score highest at a step, and among which; pruned are fewer by what the anchor uses as much,
            and more by what one step adds to another.
        scope: Whose matrices and kernels are pruned; the paper's are the matrices behind the feed-forwards' units.
        first_steps: tau.
        agreement: Share of those steps at which a weight must be skilled, exceeded; 0 for any step.
        context: What targets and anchor are put in: the concept's ``templates``, or those of what it preserves.
        pictures: How many of the concept and how many of the anchor, pairwise from the same noise; the prompts are
            spread evenly over them.
        sampling_steps: Sampler steps of a whole picture.
        guidance: Guidance scale of a picture.
        sampling_batch_size: Pictures sampled at a time; it changes speed and memory only.
    """

    sparsity: Sparsity = Field(default_factory=lambda: Sparsity(0.01, "row"))
    scope: UNetScope | None = "ffn2"
    first_steps: Annotated[int, Field(ge=1)] = 10
    agreement: Annotated[float, Field(ge=0, lt=1)] = 0.0
    context: Literal["templates", "preserved_templates"] = "templates"
    pictures: Annotated[int, Field(ge=1)] = 20
    sampling_steps: Annotated[int, Field(ge=1, le=1000)] = 50
    guidance: Annotated[float, Field(ge=0)] = 7.5
    sampling_batch_size: Annotated[int, Field(ge=1)] = 64

    def masks(
        self, model: TextToImage, concept: Concept, weights: Weights, *, seed: int, checkpoint: Path | None
    ) -> tuple[Masks, int]:
        """See :class:`erasure.pruning.scored.Scored`."""
        if self.context == "preserved_templates":
            concept = concept.in_preserved_contexts
        painting = Painting(self.pictures, self.sampling_steps, self.guidance, self.sampling_batch_size)
        # One for both, so that what differs between targets and anchors is the text alone.
        own_seed = derived_seed(seed, "conceptprune/pictures")
        use, spent = {}, 0
        for kind, prompts in (("targets", concept.target_prompts), ("anchors", concept.target_anchors)):
            use[kind], evaluations = input_squares(
                model,
                weights,
                model.encode_prompts(prompts)[spread(prompts, self.pictures)],
                painting,
                seed=own_seed,
                checkpoint=stage(checkpoint, kind),
                until=self.first_steps,
                unit_tokens=True,
            )
            spent += evaluations

        skilled_at = {name: torch.zeros_like(weight, dtype=torch.int32) for name, weight in weights.items()}
        steps = min(self.first_steps, len(model.sampling_timesteps(self.sampling_steps)))
        for step in range(steps):
            targets, anchors = (
                sizes_times_use(weights, {name: squares[step] for name, squares in kind.items()})
                for kind in use.values()
            )
            below = self.sparsity.kept({name: -scores for name, scores in targets.items()})
            for name in weights:
                skilled_at[name] += ~below[name] & (targets[name] > anchors[name])
        masks = {name: count <= self.agreement * steps for name, count in skilled_at.items()}
        return masks, spent
