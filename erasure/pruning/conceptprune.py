"""ConceptPrune: the weights that a concept uses more than its absence go."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from diffusion.model import TextToImage
from erasure.concept import Concept
from erasure.edit import Fill
from erasure.parameters import UNetScope
from erasure.protocols import Erasure, Objective
from erasure.pruning.calibration import Pictures, input_squares, sizes_times_use
from erasure.pruning.masks import Sparsity, maskable_parameters, pruned_by
from erasure.trajectories import stage


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ConceptPrune:
    """ConceptPrune (Chavhan et al., "Concept Editing in Diffusion Models via Skilled Neuron Pruning", ICLR 2025).

    At sampler step t, S^c_ij(t) = |W_ij| ||X^c_j(t)||_2 on pictures of the concept's prompts c, and S^b on the same
    with the anchor in the concept's place. X_j(t) are the values of input j at every position of every picture, both
    halves of guidance, each position's inputs divided by their norm. A weight is skilled at t if S^c is among the
    highest of its row and above S^b; the skilled weights of the first tau steps are pruned. Sampling ends there.

    Attributes:
        sparsity: How many score highest at a step, and among which; pruned are fewer by what the anchor uses as much,
            and more by what one step adds to another.
        scope: Whose matrices and kernels are pruned; the paper's are the matrices behind the feed-forwards' units.
        fill: What pruned weights become.
        first_steps: tau.
        agreement: Share of those steps at which a weight must be skilled, exceeded; 0 for any step.
        context: What targets and anchor are put in: the concept's ``templates``, or those of what it preserves.
        pictures: How many of the concept and how many of the anchor, pairwise from the same noise; the prompts are
            spread evenly over them.
        sampling_steps: Sampler steps of a whole picture.
        guidance: Guidance scale of a picture.
        sampling_batch_size: Pictures sampled at a time; it changes speed and memory only.
    """

    needs_objective: ClassVar[bool] = False

    sparsity: Sparsity = Field(default_factory=lambda: Sparsity(0.01, "row"))
    scope: UNetScope | None = "ffn2"
    fill: Fill = "zero"
    first_steps: Annotated[int, Field(ge=1)] = 10
    agreement: Annotated[float, Field(ge=0, lt=1)] = 0.0
    context: Literal["templates", "preserved_templates"] = "templates"
    pictures: Annotated[int, Field(ge=1)] = 20
    sampling_steps: Annotated[int, Field(ge=1, le=1000)] = 50
    guidance: Annotated[float, Field(ge=0)] = 7.5
    sampling_batch_size: Annotated[int, Field(ge=1)] = 64

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
        scope = self.scope or scope
        weights = maskable_parameters(model, scope)
        self.sparsity.check(weights)
        if self.context == "preserved_templates":
            concept = concept.in_preserved_contexts
        pictures = Pictures(self.pictures, self.sampling_steps, self.guidance, self.sampling_batch_size)
        use, spent = {}, 0
        for kind, prompts in (("targets", concept.target_prompts), ("anchors", concept.target_anchors)):
            use[kind], evaluations = input_squares(
                model,
                weights,
                pictures.text(model, prompts),
                pictures,
                seed=seed,
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
        return pruned_by(masks, scope=scope, fill=self.fill, seed=seed, unet_evaluations=spent)
