"""What closed-form erasers share: the least squares over keys and values of cross-attention, solved for all at once.

Every matrix W of them is to send source embeddings c where W sends destinations c*, and to stay close to itself:

    min over W' of  sum_i s_i || W' c_i - W c*_i ||^2 + lambda || W' - W ||^2   (Frobenius norm)

The solution is W' = W T with one T for all matrices,

    T = (lambda I + sum_i s_i c*_i c_i^T) (lambda I + sum_i s_i c_i c_i^T)^-1.

Embeddings of what is to stay are their own destinations.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffusion.model import TextToImage
from erasure.concept import Concept
from erasure.edit import Edit
from erasure.finetuning import prune_after
from erasure.parameters import UNetScope, scope_parameters
from erasure.protocols import Erasure, Pruning

SCOPE: UNetScope = "xattn_kv"
"""What closed-form erasers change."""

_ROWS_AT_A_TIME = 4096


@dataclass(frozen=True)
class Term:
    """One sum of the least squares: scale * sum_i || W' c_i - W c*_i ||^2.

    Attributes:
        sources: The c_i, float [n, width].
        destinations: The c*_i, float [n, width].
        scale: Their common weight s_i.
    """

    sources: Tensor
    destinations: Tensor
    scale: float

    @classmethod
    def keeping(cls, embeddings: Tensor, scale: float) -> "Term":
        """The term that holds ``embeddings`` float [n, width] where they are."""
        return cls(embeddings, embeddings, scale)


def right_multiplication(terms: Sequence[Term], ridge: float, kept: Tensor | None = None) -> Tensor:
    """T of the module's formula, float64 [width, width] on the CPU.

    Args:
        terms: The sums.
        ridge: lambda; above 0 unless the embeddings span all dimensions.
        kept: One more sum, of embeddings that stay where they are: sum_i s_i c_i c_i^T, float64 [width, width].
    """
    identity = torch.eye(terms[0].sources.shape[1], dtype=torch.float64)
    gram = ridge * identity
    if kept is not None:
        gram += kept
    change = torch.zeros_like(identity)
    for term in terms:
        for sources, destinations in zip(
            term.sources.split(_ROWS_AT_A_TIME), term.destinations.split(_ROWS_AT_A_TIME), strict=True
        ):
            c = sources.to("cpu", torch.float64)
            gram += term.scale * c.T @ c
            if term.destinations is not term.sources:
                change += term.scale * (destinations.to("cpu", torch.float64) - c).T @ c
    # T - I has the differences alone in its numerator, which keeps what stays exact.
    return identity + solved(gram, change, left=False)


def solved(matrix: Tensor, right: Tensor, *, left: bool = True) -> Tensor:
    """X of matrix X = right, or of X matrix = right where not ``left``; float64, like both.

    Raises:
        ValueError: The matrix is singular.
    """
    try:
        return torch.linalg.solve(matrix, right, left=left)  # type: ignore[no-any-return]
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ValueError(
            "The least squares of the closed form have no solution, as their matrix is singular; take a larger ridge."
        ) from error


def key_value_weights(model: TextToImage) -> dict[str, Tensor]:
    """The matrices that closed-form erasers change by parameter name, float [any, width].

    Raises:
        ValueError: The network has no cross-attention, whose keys and values are linear in the text.
    """
    model.denoiser.text_attention()
    return {name: weight.detach() for name, weight in scope_parameters(model, SCOPE).items() if weight.ndim == 2}


def sum_of_squares(weights: Iterable[Tensor]) -> Tensor:
    """The sum of W^T W over matrices float [any, width]; float64 [width, width] on the CPU."""
    stacked = torch.cat([weight.to("cpu", torch.float64) for weight in weights])
    return stacked.T @ stacked


class ClosedForm(ABC):
    """An eraser that multiplies all keys and values of cross-attention by one matrix, found without training."""

    has_objective: ClassVar[bool] = False

    @abstractmethod
    def right_multiplication(self, model: TextToImage, concept: Concept) -> Tensor:
        """T of W' = W T, float64 [width, width]."""

    def solution(
        self, model: TextToImage, concept: Concept, *, seed: int, checkpoint: Path | None
    ) -> tuple[Tensor, dict[str, Any], int]:
        """T, what the edit is to say of it, and the U-Net evaluations that it cost; a method that samples has some."""
        return self.right_multiplication(model, concept), {}, 0

    def erase(
        self, model: TextToImage, concept: Concept, pruning: Pruning, *, seed: int, checkpoint: Path | None = None
    ) -> Erasure:
        """See :class:`erasure.protocols.Eraser`."""
        weights = key_value_weights(model)
        right, said, spent = self.solution(model, concept, seed=seed, checkpoint=checkpoint)
        erasure = Erasure(Edit.from_right_multiplication(right, weights, said), [], spent)
        return prune_after(erasure, self, pruning, model, concept, scope=SCOPE, seed=seed, checkpoint=checkpoint)
