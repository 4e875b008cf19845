"""SparseGPT: the weights that matter least to what must stay go, and those that are left make up for them."""

from pathlib import Path
from typing import Annotated, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffusion.checked import checked
from diffusion.model import TextToImage
from diffusion.progress import track
from diffusion.streams import derived_seed
from erasure.concept import Concept
from erasure.edit import Edit
from erasure.parameters import UNetScope
from erasure.pictures import Painting
from erasure.protocols import Erasure, Objective
from erasure.pruning.calibration import Prompts, input_products, prompts_of, spread
from erasure.pruning.masks import Sparsity, mask_counts, maskable_parameters


@checked
class SparseGPT:
    """SparseGPT (Frantar and Alistarh, "Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023).

    min || W' X - W X ||^2 over W' that are zero where pruned, column by column. With H = 2 X X^T / n + lambda I,
    lambda = damping * mean(diag(2 X X^T / n)), and G = (H_{c:,c:})^-1 the inverse over the columns from c on, in which
    c comes first: the saliency of w_c is w_c^2 / G_cc (in the paper's algorithm [H^-1]_cc^2, of the Cholesky factor).
    Every ``block_size`` columns those of the lowest saliency are chosen; then a pruned w_c becomes zero and every
    later w_j of its row w_j - w_c G_cj / G_cc. X are the inputs as :class:`erasure.pruning.wanda.Wanda` has them, a
    kernel's with its input channels last. Every layer has the inputs from before anything is pruned, where the paper
    prunes one after the other. The authors' code prunes what is no more than the k-th smallest saliency of a block,
    counted from 0: one weight more a block than here.

    Attributes:
        sparsity: How many are pruned, and among which: of the block's columns, ``layer`` compares all rows (the
            paper's) and ``row`` each by itself; a number M is N:M, chosen every M columns.
        scope: Whose matrices and kernels are pruned; None for the eraser's. H of a matrix takes 8 inputs^2 bytes, that
            of a kernel of k x k weights k^4 times as many.
        block_size: Columns at a time; N:M rounds it to whole groups.
        damping: Of H, relative to the mean of its diagonal.
        prompts: What the pictures are of: the concept's ``preserved`` phrases, its ``anchors`` or its ``targets``.
        pictures: How many, the prompts spread evenly over them.
        sampling_steps: Sampler steps of a picture.
        guidance: Guidance scale of a picture.
        sampling_batch_size: Pictures sampled at a time; it changes speed and memory only.
    """

    needs_objective: ClassVar[bool] = False

    sparsity: Sparsity = Field(default_factory=lambda: Sparsity(0.5, "layer"))
    scope: UNetScope | None = None
    block_size: Annotated[int, Field(ge=1)] = 128
    damping: Annotated[float, Field(gt=0)] = 0.01
    prompts: Prompts = "preserved"
    pictures: Annotated[int, Field(ge=1)] = 128
    sampling_steps: Annotated[int, Field(ge=1, le=1000)] = 50
    guidance: Annotated[float, Field(ge=0)] = 7.5
    sampling_batch_size: Annotated[int, Field(ge=1)] = 64

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.sparsity.per == "global":
            raise ValueError(
                "sparsity.per is 'global' and SparseGPT prunes one layer at a time; "
                "choose 'layer', 'row' or a number M for N:M."
            )
        return self

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
        painting = Painting(self.pictures, self.sampling_steps, self.guidance, self.sampling_batch_size)
        prompts = prompts_of(concept, self.prompts)
        text = model.encode_prompts(prompts)[spread(prompts, self.pictures)]
        own_seed = derived_seed(seed, "sparsegpt/pictures")
        products, spent = input_products(model, weights, text, painting, seed=own_seed, checkpoint=checkpoint)
        masks, after = {}, {}
        for name, weight in track(weights.items(), "layers", len(weights)):
            inputs_last = weight.detach().movedim(1, -1)
            pruned, kept = self.pruned(inputs_last.flatten(1).to("cpu", torch.float64), products.pop(name))
            after[name] = pruned.reshape(inputs_last.shape).movedim(-1, 1).to(weight)
            masks[name] = kept.reshape(inputs_last.shape).movedim(-1, 1)
        return Erasure(Edit.from_weights(weights, after, {"scope": scope, **mask_counts(masks)}), [], spent)

    def pruned(self, weights: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
        """Prune a matrix.

        Args:
            weights: float64 [outputs, inputs].
            products: X X^T up to a factor, float64 [inputs, inputs].

        Returns:
            The matrix with zeros, float64, and which weights are kept, bool, both [outputs, inputs].
        """
        weights, kept = weights.clone(), torch.ones_like(weights, dtype=torch.bool)
        # A factor in H changes nothing. Where all inputs are zero, so that H is, every weight matters as little.
        damping = self.damping * float(products.diagonal().mean()) or 1.0
        hessian = products + damping * torch.eye(len(products), dtype=products.dtype)
        try:
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
            # Row c of this factor, from c on, is that of G over the root of G_cc.
            factor = torch.linalg.cholesky(inverse, upper=True)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise ValueError(
                f"damping is {self.damping} and a layer's H is not positive-definite with it; take more damping."
            ) from error
        group = self.sparsity.per if isinstance(self.sparsity.per, int) else 1
        block_size = max(group, self.block_size // group * group)
        for start in range(0, weights.shape[1], block_size):
            block = slice(start, min(start + block_size, weights.shape[1]))
            within = factor[block, block]
            some = weights[:, block]
            choice = group if group > 1 else some.shape[1]
            errors = torch.zeros_like(some)
            for column in range(some.shape[1]):
                if column % choice == 0:
                    chosen = slice(column, column + choice)
                    saliency = (some[:, chosen] / within.diagonal()[chosen]).square()
                    kept[:, block][:, chosen] = self.sparsity.kept({"": saliency})[""]
                left = some[:, column] * kept[:, start + column]
                errors[:, column] = (some[:, column] - left) / within[column, column]
                some[:, column + 1 :] -= torch.outer(errors[:, column], within[column, column + 1 :])
                some[:, column] = left
            weights[:, block.stop :] -= errors @ factor[block, block.stop :]
        return weights, kept
