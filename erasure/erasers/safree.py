"""SAFREE: prompts are filtered as they are read; the weights stay as they are."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from diffusion.checked import checked
from diffusion.model import TextToImage
from erasure.additions.safree import Filters, Projection
from erasure.concept import Concept
from erasure.edit import Edit
from erasure.finetuning import prune_after
from erasure.parameters import UNetScope
from erasure.phrases import joined_targets
from erasure.protocols import Erasure, Pruning

Scale = Annotated[float, Field(ge=0, le=1)]


@checked
class SAFREE:
    """SAFREE (Yoon et al., "Training-Free and Adaptive Guard for Safe Text-to-Image And Video Generation", ICLR 2025).

    Pooled embeddings, those at the end token, of the concept's targets span a subspace with projector P_c. Of a prompt
    with embeddings e, m_i is the pooled one after token i was replaced by the vocabulary's first; they span a subspace
    with projector P_m. Token i is a trigger if
        || (I - P_c) m_i || >= (1 + alpha) mean over j != i of || (I - P_c) m_j ||
    and then P_m (I - P_c) e_i takes the place of e_i. Self-validating filtering gives the U-Net this text at steps
        i <= round(gamma sigmoid(2 k (10 beta - t_0))),   beta = 1 - mean over the prompt of cos(e, P_m (I - P_c) e)
    counted from 0, and the original one after them; start and end token take part in the mean. The paper prints
    gamma sigmoid(beta), which is k = 1/20 and t_0 = 0; the values below are the authors' code's. A token without others
    is a trigger, as in that code.

    Latent re-attention predicts the original prompt beside the filtered one at every guided step, and turns down the
    lowest frequencies F of what skip connections bring the U-Net's upward path where it is widest and second widest:
        F -> s F   where F(filtered) > F(original), in real parts
    which is the paper's formula; copies of the authors' code set such frequencies to s itself. As in FreeU's code, the
    channels that a layer adds the connection to decide: of Stable Diffusion 1 the first two blocks and the first layer
    of the third have 1280 and the first s, the rest of the third and the first layer of the last 640 and the second.
    In the authors' script all of it does nothing unless its argument is safree='low', which no option of it gives.

    Attributes:
        alpha: As above.
        slope: k.
        midpoint: t_0.
        most_steps: gamma; null to filter at every step.
        steps: Of the sampler in whose steps gamma counts; a step stands for its timestep, whatever the sampler of a
            picture.
        projection: ``prompt_last``: P_m (I - P_c), as the paper has it; ``concept_last``: (I - P_c) P_m, as the
            authors' code has it.
        in_templates: Targets in every template span the subspace, not just by themselves.
        negative_prompt: When the targets in one phrase take the empty prompt's place in guidance: ``never``, as in the
            paper; ``always``, as in the authors' code; or ``while_filtering``, as long as the prompt is filtered.
        skip_scales: s of latent re-attention at the two widths; null for none, as the authors' script runs. It costs
            three U-Net evaluations a step where guidance costs two.
        scope: What a pruning strategy without a scope of its own prunes.
    """

    has_objective: ClassVar[bool] = False

    alpha: Annotated[float, Field(ge=0)] = 0.01
    slope: Annotated[float, Field(ge=0)] = 2.5
    midpoint: float = 5.333
    most_steps: Annotated[int, Field(ge=0)] | None = 10
    steps: Annotated[int, Field(ge=1)] = 50
    projection: Projection = "prompt_last"
    in_templates: bool = False
    negative_prompt: Literal["never", "always", "while_filtering"] = "never"
    skip_scales: tuple[Scale, Scale] | None = None
    scope: UNetScope = "xattn"

    def erase(
        self, model: TextToImage, concept: Concept, pruning: Pruning, *, seed: int, checkpoint: Path | None = None
    ) -> Erasure:
        """See :class:`erasure.protocols.Eraser`."""
        model.require_one_text_encoder("SAFREE")
        targets = [target for part in concept.parts for target in part.targets]
        negative = None
        if self.negative_prompt != "never":
            negative = model.encode_prompts([joined_targets(model, concept)])[0].cpu()
        filters = Filters(
            subspace(model, concept.target_prompts if self.in_templates else targets),
            negative,
            self.negative_prompt == "while_filtering",
            self.alpha,
            self.slope,
            self.midpoint,
            self.most_steps,
            self.steps,
            self.projection,
            self.skip_scales,
        )
        erasure = Erasure(Edit({}, {}, (filters,)), [], 0)
        return prune_after(erasure, self, pruning, model, concept, scope=self.scope, seed=seed, checkpoint=checkpoint)


def subspace(model: TextToImage, prompts: list[str]) -> Tensor:
    """An orthonormal basis of what the pooled embeddings of ``prompts`` span, float64 [r, width] on the CPU."""
    ends = (model.tokenize(prompts) == model.tokenizer.eos_token_id).int().argmax(1)
    text = model.encode_prompts(prompts)
    pooled = text[torch.arange(len(text)), ends].cpu()
    _, sizes, directions = torch.linalg.svd(pooled.double(), full_matrices=False)
    rank = int((sizes > 64 * torch.finfo(pooled.dtype).eps * sizes[0]).sum())
    return directions[:rank].clone()  # type: ignore[no-any-return]
