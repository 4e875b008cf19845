"""What closed-form erasers share: the least squares over the matrices that read text, solved for all at once.

Those are the keys and values of cross-attention, each of which reads the prompt's text as it is. Where text and picture
are one sequence (Stable Diffusion 3, FLUX) keys and values depend on the picture too, and what is linear in the text
are the two matrices that it enters by: that of its rows, and that of the pooled embedding. Each has a T of its own.

Every matrix W of them is to send source embeddings c where W sends destinations c*, and to stay close to itself:

    min over W' of  sum_i s_i || W' c_i - W c*_i ||^2 + lambda || W' - W ||^2   (Frobenius norm)

The solution is W' = W T with one T for all matrices,

    T = (lambda I + sum_i s_i c*_i c_i^T) (lambda I + sum_i s_i c_i c_i^T)^-1.

Embeddings of what is to stay are their own destinations.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffusion.denoisers.protocol import Reads, Selector
from diffusion.model import TextToImage
from diffusion.parameters import selected_parameters
from erasure.concept import Concept
from erasure.edit import Edit
from erasure.finetuning import prune_after
from erasure.parameters import UNetScope, scope_parameters
from erasure.protocols import Erasure, Pruning

SCOPE: UNetScope = "xattn_kv"
"""Keys and values of cross-attention."""

_ROWS_AT_A_TIME = 4096
_PROMPTS, _PROMPTS_WITH_T5 = 256, 32


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


@dataclass(frozen=True)
class Tokens:
    """Embeddings of prompts in the order of one tokenizer's tokens.

    Attributes:
        rows: float [n, tokens, width].
        ends: The end token of each prompt.
    """

    rows: Tensor
    ends: Sequence[int]

    def from_last_subject_token(self, count: int | None) -> list[Tensor]:
        """Of each prompt those from the token before its end on, ``count`` of them or all, float64 [any, width].

        Those of an empty prompt are from its start on.
        """
        starts = [max(end - 1, 0) for end in self.ends]
        stops = [None if count is None else start + count for start in starts]
        return [text[start:stop].double() for text, start, stop in zip(self.rows, starts, stops, strict=True)]


@dataclass(frozen=True)
class Door:
    """Matrices that read the same embeddings of a text.

    Attributes:
        reads: What they read.
        weights: The matrices by parameter name, float [any, width].
    """

    reads: Reads
    weights: dict[str, Tensor]

    def from_last_subject_tokens(
        self, model: TextToImage, prompts: Sequence[str], count: int | None = None
    ) -> list[Tensor]:
        """See :class:`Tokens`: of every prompt by the first tokenizer, and below them by a second."""
        found: dict[int, list[Tensor]] = defaultdict(list)
        for read in self._read(model, prompts):
            for place, tokens in enumerate(read):
                found[place] += tokens.from_last_subject_token(count)
        return [rows for place in sorted(found) for rows in found[place]]

    def rows(self, model: TextToImage, prompts: Sequence[str]) -> Tensor:
        """All that the matrices are given of prompts, float [any, width]."""
        return torch.cat([tokens.rows.flatten(0, 1) for read in self._read(model, prompts) for tokens in read])

    def _read(self, model: TextToImage, prompts: Sequence[str]) -> Iterator[list[Tokens]]:
        """What they are given of some prompts at a time, by tokenizer; a pooled embedding is the only token."""
        # A prompt that a T5 reads has 8 MB.
        together = _PROMPTS_WITH_T5 if model.text_encoders.reads_text else _PROMPTS
        for start in range(0, len(prompts), together):
            chunk = prompts[start : start + together]
            text = model.encode_prompts(chunk)
            rows, pooled = model.text_encoders.split(text)
            if self.reads == "rows":
                spans = model.text_encoders.spans(model.tokenize(chunk), chunk)
                yield [Tokens(rows[:, span.rows], span.ends) for span in spans]
            elif pooled is None:
                raise ValueError(f"{model.name!r} has no pooled embedding, and {', '.join(self.weights)} reads one.")
            else:
                yield [Tokens(pooled[:, None], [1] * len(chunk))]

    def edit(self, right: Tensor) -> Edit:
        """The edit to W T, which stores T, or the matrices where they are smaller."""
        if right.numel() < sum(weight.numel() for weight in self.weights.values()):
            return Edit.from_right_multiplication(right, self.weights)
        changed = {
            name: (weight.double() @ right.to(weight.device)).to(weight) for name, weight in self.weights.items()
        }
        return Edit.from_weights(self.weights, changed)


def doors_of(model: TextToImage) -> list[Door]:
    """Where text enters the network."""

    def matrices(selects: Selector) -> dict[str, Tensor]:
        selected = selected_parameters(model, selects)
        return {name: weight.detach() for name, weight in selected.items() if weight.ndim == 2}

    return [Door(reads, matrices(selects)) for reads, selects in model.denoiser.doors.items()]


def multiplied(doors: Sequence[Door], rights: Sequence[Tensor], metadata: Mapping[str, Any] | None = None) -> Edit:
    """The edit by which the matrices of every door are multiplied by a T, float64 [width, width]."""
    edits = [door.edit(right) for door, right in zip(doors, rights, strict=True)]
    return Edit({name: entry for edit in edits for name, entry in edit.entries.items()}, dict(metadata or {}))


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
    """An eraser that multiplies all matrices of a door by one, found without training."""

    has_objective: ClassVar[bool] = False

    @abstractmethod
    def right_multiplication(self, model: TextToImage, concept: Concept, door: Door) -> Tensor:
        """T of W' = W T for the matrices of a door, float64 [width, width]."""

    def solution(
        self, model: TextToImage, concept: Concept, doors: Sequence[Door], *, seed: int, checkpoint: Path | None
    ) -> tuple[list[Tensor], dict[str, Any], int]:
        """T of every door, what the edit is to say of them, and the evaluations that they cost; a method may sample."""
        return [self.right_multiplication(model, concept, door) for door in doors], {}, 0

    def erase(
        self, model: TextToImage, concept: Concept, pruning: Pruning, *, seed: int, checkpoint: Path | None = None
    ) -> Erasure:
        """See :class:`erasure.protocols.Eraser`."""
        doors = doors_of(model)
        rights, said, spent = self.solution(model, concept, doors, seed=seed, checkpoint=checkpoint)
        erasure = Erasure(multiplied(doors, rights, said), [], spent)
        scope = model.denoiser.text_scope
        return prune_after(erasure, self, pruning, model, concept, scope=scope, seed=seed, checkpoint=checkpoint)
