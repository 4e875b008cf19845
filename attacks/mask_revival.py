"""Mask revival: fill the zeros that pruning left from the weights around them."""

import logging
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from attacks.cases import Outcome, PromptCase, ThreatModel
from attacks.evaluate import Proposal, Trace, search
from diffusion.checked import checked
from diffusion.model import TextToImage
from diffusion.parameters import matching_parameters, substituted
from diffusion.sampling import DEFAULT_SAMPLING, Sampling
from evaluation.verdicts import Judge

log = logging.getLogger(__name__)

Magnitude = Literal["max", "mean", "completed"]

Weights = dict[str, Tensor]
"""Parameters of the U-Net by name."""

MARGIN = 1e-6
"""By how much a revived weight of magnitude ``max`` outdoes the largest of its row."""


@checked
class MaskRevival:
    """Roots Beneath the Cut (arXiv 2603.06640).

    A pruned weight is an exact zero, so the edited weights say where the concept was. Every matrix W with zeros M is
    completed by soft-impute, from X = W with each zero at the mean of what is left in its column:
        U diag(s) V^T = X,   L = U diag(max(s - min(s), 0)) V^T,   X <- W outside M, L on M
    until || X - X before || / || X before || < tolerance. Of the completed values on M the ``top_ratio`` with the
    largest |X| give their signs, the others stay zero; their magnitudes come from what is left in their row of W:
        W[i, j] <- sign(X[i, j]) max_k |W[i, k]| (1 + 1e-6)
    With these weights the plain prompt is drawn, once per ``top_ratio``, and judged. Neither data nor the U-Net nor
    another model takes part in the filling.

    A row or a column of which nothing is left stays zero, and so do biases and norms. The published code stops at such
    rows and columns, and it replaces a magnitude by a draw from a normal distribution with the row's moments where
    that is larger, which it hardly ever is. A model without zeros, such as one that was fine-tuned or whose pruned
    weights were filled with something else, is not attacked.

    Attributes:
        top_ratios: Fractions of the zeros of each matrix that are revived, in the order of trying.
        magnitude: Of revived weights: ``max`` or ``mean`` of |W| over what is left in their row, or ``completed``: |X|.
        tolerance: Relative change that ends the completion.
        iterations: The most of them.
        lag: How many iterations back X is compared with; the published code compares with the last but one.
        least_pruned: Smallest fraction of zeros in a matrix that counts as pruned. Weights rounded to half precision
            have zeros of their own.
        parameters: Which matrices and kernels of the U-Net, a pattern for their names, as ``*.ff.net.2.weight``.
        batch_size: Prompts at a time; it changes speed and memory, never an outcome.
    """

    top_ratios: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)] = (0.6,)
    magnitude: Magnitude = "max"
    tolerance: Annotated[float, Field(gt=0)] = 1e-5
    iterations: Annotated[int, Field(ge=1)] = 500
    lag: Annotated[int, Field(ge=1)] = 1
    least_pruned: Annotated[float, Field(gt=0, le=1)] = 0.001
    parameters: str = "*"
    batch_size: Annotated[int, Field(ge=1)] = 64

    threat_model: ClassVar[ThreatModel] = "white_box"

    def run(
        self, model: TextToImage, cases: Sequence[PromptCase], judge: Judge, *, sampling: Sampling = DEFAULT_SAMPLING
    ) -> Iterator[Outcome]:
        """Yield each case's outcome when its pictures are judged; the model's own weights are never touched.

        Raises:
            ValueError: No parameter of the U-Net has a name like ``parameters``.
        """
        pruned = self.find_pruned(model)
        if not pruned:
            log.info("mask revival: no matrix of %s has zeros enough, so there is nothing to revive", model.name)
        variants = [_variant(ratio) for ratio in self.top_ratios]

        @cache
        def revived() -> dict[str, Weights]:
            return self.revive(pruned)

        def propose(traces: list[Trace]) -> list[Proposal]:
            return [Proposal(trace.case.prompt, variant=variants[trace.attempts]) for trace in traces]

        return search(
            model,
            cases,
            judge,
            propose,
            sampling=sampling,
            rounds=len(variants) if pruned else 0,
            batch_size=self.batch_size,
            under=lambda variant: substituted(model, revived()[variant]),
        )

    def find_pruned(self, model: TextToImage) -> Weights:
        """Return the matrices and kernels of the U-Net of which enough is zero, and something is not."""
        weights = {
            name: weight.detach()
            for name, weight in matching_parameters(model, self.parameters).items()
            if weight.ndim >= 2
        }
        zeros = {name: (weight == 0).double().mean().item() for name, weight in weights.items()}
        return {name: weight for name, weight in weights.items() if self.least_pruned <= zeros[name] < 1}

    def revive(self, pruned: Mapping[str, Tensor]) -> dict[str, Weights]:
        """Return pruned matrices and kernels with their zeros filled, for every variant."""
        revived: dict[str, Weights] = {_variant(ratio): {} for ratio in self.top_ratios}
        for name, weight in pruned.items():
            matrix = weight.flatten(1).double()
            completed = soft_impute(matrix, tolerance=self.tolerance, iterations=self.iterations, lag=self.lag)
            for ratio in self.top_ratios:
                filled = fill_zeros(matrix, completed, ratio, self.magnitude)
                revived[_variant(ratio)][name] = filled.reshape(weight.shape).to(weight.dtype)
        zeros = sum(_count_zeros(weight) for weight in pruned.values())
        for variant, weights in revived.items():
            filled_in = zeros - sum(_count_zeros(weight) for weight in weights.values())
            log.info("mask revival, %s: %d of %d zeros in %d matrices filled", variant, filled_in, zeros, len(pruned))
        return revived


def soft_impute(matrix: Tensor, *, tolerance: float, iterations: int, lag: int = 1) -> Tensor:
    """Complete a matrix whose zeros are missing; where a row or a column has nothing else, they stay.

    Args:
        matrix: float64 [n, m].
        tolerance: Relative change that ends the completion.
        iterations: The most of them.
        lag: How many iterations back the comparison goes.

    Returns:
        float64 [n, m].
    """
    observed = matrix != 0
    rows, columns = observed.any(dim=1), observed.any(dim=0)
    known, values = observed[rows][:, columns], matrix[rows][:, columns]
    filled = torch.where(known, values, values.sum(dim=0) / known.sum(dim=0))
    earlier = deque([filled], maxlen=lag)
    for _ in range(iterations):
        left, scales, right = torch.linalg.svd(filled, full_matrices=False)
        filled = torch.where(known, values, (left * (scales - scales[-1])) @ right)
        if len(earlier) == lag and (filled - earlier[0]).norm() < tolerance * earlier[0].norm():
            break
        earlier.append(filled)
    completed = torch.zeros_like(matrix)
    completed[torch.outer(rows, columns)] = filled.flatten()
    return completed


def fill_zeros(matrix: Tensor, completed: Tensor, top_ratio: float, magnitude: Magnitude) -> Tensor:
    """Fill the zeros of a matrix for which ``completed`` has the largest values.

    Args:
        matrix: float64 [n, m].
        completed: float64 [n, m].
        top_ratio: Fraction of the zeros that are completed; what is over is rounded up, and ties go to the later.
        magnitude: What gives their size; ``completed`` gives their sign.

    Returns:
        float64 [n, m].
    """
    missing = (matrix == 0) & (completed != 0)
    sizes = completed[missing].abs()
    # (1 - 0.9) * 10 is 1, although in floating point it is below that.
    weakest = sizes.argsort(stable=True)[: math.floor(round((1 - top_ratio) * len(sizes), 6))]
    revived = torch.ones_like(sizes, dtype=torch.bool)
    revived[weakest] = False
    missing[missing.clone()] = revived
    match magnitude:
        case "max":
            scale = matrix.abs().amax(dim=1, keepdim=True) * (1 + MARGIN)
        case "mean":
            scale = matrix.abs().sum(dim=1, keepdim=True) / (matrix != 0).sum(dim=1, keepdim=True)
        case "completed":
            scale = completed.abs()
    return torch.where(missing, completed.sign() * scale, matrix)


def _variant(top_ratio: float) -> str:
    return f"top {top_ratio:g}"


def _count_zeros(weight: Tensor) -> int:
    return int((weight == 0).sum())
