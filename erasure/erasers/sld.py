"""SLD: sampling is guided away from the concept; the weights stay as they are."""

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from diffusion.checked import checked
from diffusion.model import TextToImage
from erasure.additions.safe_guidance import SafeGuidance, Scaling
from erasure.concept import Concept
from erasure.edit import Edit
from erasure.finetuning import prune_after
from erasure.parameters import UNetScope
from erasure.phrases import joined_targets
from erasure.protocols import Erasure, Pruning


@checked
class SLD:
    """Safe Latent Diffusion (Schramowski et al., "Mitigating Inappropriate Degeneration ...", CVPR 2023).

    Every sampler step i takes the noise
        eps = eps(z) + s_g (eps(z, c_p) - eps(z) - gamma_i),   gamma left out for i < delta
        gamma_i = mu (eps(z, c_S) - eps(z)) + s_m nu_i,   nu_{i+1} = beta_m nu_i + (1 - beta_m) gamma_i,   nu_0 = 0
        mu = min(1, |phi|) where eps(z, c_p) - eps(z, c_S) < lambda, else 0,   phi = s_S (eps(z, c_p) - eps(z, c_S))
    with c_p the prompt, c_S the concept's targets in one phrase, mu and phi element by element. It costs three U-Net
    evaluations a step where guidance costs two. It acts at every guidance scale s_g, 1 included, where the authors'
    code leaves it out. Where velocity is predicted, differences count as those of noise, which are (1 - s) times as
    large: lambda and s_S are numbers for noise, which published ports to FLUX do not rescale.

    The predictions of a single prompt are those of the unedited model, so white-box attacks that look for tokens under
    them meet SLD only when their pictures are made, as in the published attacks on it.

    Attributes:
        safety_scale: s_S.
        threshold: lambda.
        warmup_steps: delta, in steps of the sampler; momentum is built up before.
        momentum_scale: s_m.
        momentum_beta: beta_m.
        scaling: ``at_most_1``: mu as above, as in the authors' code; ``at_least_1``: max(1, |phi|), as the paper
            prints it, with which its values of s_S leave nothing of a picture.
        scope: What a pruning strategy without a scope of its own prunes.
    """

    has_objective: ClassVar[bool] = False

    safety_scale: Annotated[float, Field(gt=0)] = 1000.0
    threshold: float = 0.01
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    momentum_scale: Annotated[float, Field(ge=0)] = 0.3
    momentum_beta: Annotated[float, Field(ge=0, lt=1)] = 0.4
    scaling: Scaling = "at_most_1"
    scope: UNetScope = "xattn"

    def erase(
        self, model: TextToImage, concept: Concept, pruning: Pruning, *, seed: int, checkpoint: Path | None = None
    ) -> Erasure:
        """See :class:`erasure.protocols.Eraser`."""
        [text] = model.encode_prompts([joined_targets(model, concept)])
        added = SafeGuidance(
            text.cpu(),
            self.safety_scale,
            self.threshold,
            self.warmup_steps,
            self.momentum_scale,
            self.momentum_beta,
            self.scaling,
        )
        erasure = Erasure(Edit({}, {}, (added,)), [], 0)
        return prune_after(erasure, self, pruning, model, concept, scope=self.scope, seed=seed, checkpoint=checkpoint)
