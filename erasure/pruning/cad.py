"""CAD: the weights that the concept's prediction is attributed to go."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from diffusion.checked import checked
from diffusion.model import TextToImage
from diffusion.streams import derived_seed
from erasure.concept import Concept
from erasure.finetuning import gradient, noise_error
from erasure.parameters import UNetScope
from erasure.pruning.masks import Masks, Sparsity
from erasure.pruning.scored import Scored, Weights
from erasure.trajectories import FrozenSamples, Trajectories


@checked
class CAD(Scored):
    """Component attribution (Nguyen et al., "Unveiling Concept Attribution in Diffusion Models", 2024).

    J = sum_t || eps_theta(x_t, c, t) - sg[eps_theta(x_t, 0, t)] ||^2 says how far the concept's prompt c moves the
    prediction from the empty prompt's, along guided trajectories of c. To first order zeroing a weight changes J by
    -S with S = W * grad J; the weights of the highest S are pruned, if it is positive. The authors score x_t at a
    timestep that says more noise than it has, and sum gradients in float16; here t is x_t's own.

    Attributes:
        sparsity: How many are pruned, if so many are positive, and among which.
        scope: Whose matrices and kernels are pruned; the authors' are the feed-forwards.
        trajectories: How many; the targets' prompts are spread evenly over them. Every t lies on the same ones, where
            the authors start anew for each.
        sampling_steps: Sampler steps of a trajectory, all of which are looked at.
        trajectory_guidance: Guidance scale of a trajectory.
        batch_size: Points at a time when there are gradients; it changes speed and memory only.
        sampling_batch_size: Trajectories sampled at a time; it changes speed and memory only.
    """

    sparsity: Sparsity = Field(default_factory=lambda: Sparsity(0.001, "row"))
    scope: UNetScope | None = "ffn"
    trajectories: Annotated[int, Field(ge=1)] = 1
    sampling_steps: Annotated[int, Field(ge=1, le=1000)] = 50
    trajectory_guidance: Annotated[float, Field(ge=0)] = 3.0
    batch_size: Annotated[int, Field(ge=1)] = 1
    sampling_batch_size: Annotated[int, Field(ge=1)] = 64

    def masks(
        self, model: TextToImage, concept: Concept, weights: Weights, *, seed: int, checkpoint: Path | None
    ) -> tuple[Masks, int]:
        """See :class:`erasure.pruning.scored.Scored`."""
        samples = FrozenSamples(
            model,
            model.encode_prompts(concept.target_prompts),
            Trajectories(self.sampling_steps, self.trajectory_guidance, self.trajectories, self.sampling_batch_size),
            target_guidance=0.0,
            steps=1,
            batch_size=self.trajectories * len(model.sampling_timesteps(self.sampling_steps)),
            seed=derived_seed(seed, "cad/trajectories"),
            checkpoint=checkpoint,
        )
        points, text = samples.batch(0)
        before = model.unet_evaluations
        with model.trainable(list(weights.values())):
            parts = (
                noise_error(model, x, t, c, without) * len(x)
                for x, t, c, without in zip(
                    *(
                        column.split(self.batch_size)
                        for column in (points.latents, points.timesteps, text, points.targets)
                    ),
                    strict=True,
                )
            )
            gradients = gradient(model, parts, weights)
        scores = {name: value * weights[name].detach() for name, value in gradients.items()}
        highest = self.sparsity.kept({name: -value for name, value in scores.items()})
        masks = {name: kept | (scores[name] <= 0) for name, kept in highest.items()}
        spent = samples.unet_evaluations + model.unet_evaluations - before
        return masks, spent
