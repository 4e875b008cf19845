"""RECE: UCE, then the embeddings that still bring the concept back are found and erased in turn, in closed form."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from diffusion.model import TextToImage
from erasure.closed_form import (
    Term,
    encode_all,
    erase_by_right_multiplication,
    key_value_weights,
    right_multiplication,
    sum_of_squares,
)
from erasure.concept import Concept
from erasure.erasers.uce import UCE
from erasure.protocols import Erasure, Pruning


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class RECE:
    """Reliable and Efficient Concept Erasure (Gong et al., ECCV 2024).

    W T_0 are UCE's keys and values. Every epoch derives for each embedding c of the targets the adversarial one
    c' = argmin sum_W || W T c' - W c ||^2 + mu ||c'||^2 = (mu I + T^T G T)^-1 T^T G c,  G = sum_W W^T W,
    which makes the edited W T do what the original W does on c, and erases it: T becomes T S, with S the map of
    :mod:`erasure.closed_form` that sends c' to the destination and holds what is preserved, all tokens of each.

    Attributes:
        uce: How the first erasure is done.
        epochs: Rounds after it.
        adversarial_ridge: mu, called lambda in the paper; the smaller, the stronger c' and what erasing it costs.
        destination: What adversarial embeddings are sent to: those of the ``empty`` prompt (the authors), or of the
            concept's ``anchor`` in the target's template.
        ridge: lambda of S.
        erase_scale: Weight of the adversarial embeddings in S.
        preserve_scale: Weight of the preserved prompts and of the empty one in S.
    """

    has_objective: ClassVar[bool] = False

    uce: UCE = Field(default_factory=UCE)
    epochs: Annotated[int, Field(ge=1)] = 1
    adversarial_ridge: Annotated[float, Field(gt=0)] = 1e-1
    destination: Literal["empty", "anchor"] = "empty"
    ridge: Annotated[float, Field(gt=0)] = 0.1
    erase_scale: Annotated[float, Field(gt=0)] = 1.0
    preserve_scale: Annotated[float, Field(ge=0)] = 0.1

    def erase(
        self, model: TextToImage, concept: Concept, pruning: Pruning, *, seed: int, checkpoint: Path | None = None
    ) -> Erasure:
        """See :class:`erasure.protocols.Eraser`."""
        right = self.right_multiplication(model, concept)
        return erase_by_right_multiplication(right, self, pruning, model, concept, seed=seed, checkpoint=checkpoint)

    def right_multiplication(self, model: TextToImage, concept: Concept) -> Tensor:
        """T of W' = W T, float64 [width, width]."""
        gram = sum_of_squares(key_value_weights(model).values())
        targets = encode_all(model, concept.target_prompts).flatten(0, 1).to("cpu", torch.float64)
        anchors = concept.anchor_prompts * len(concept.targets)
        wanted = anchors if self.destination == "anchor" else [""] * len(concept.target_prompts)
        destinations = encode_all(model, wanted).flatten(0, 1)
        kept = Term.keeping(encode_all(model, ["", *concept.preserved_prompts]).flatten(0, 1), self.preserve_scale)
        right = self.uce.right_multiplication(model, concept)
        for _ in range(self.epochs):
            adversarial = Term(targets @ self._attack(gram, right).T, destinations, self.erase_scale)
            right = right @ right_multiplication([adversarial, kept], self.ridge)
        return right

    def _attack(self, gram: Tensor, right: Tensor) -> Tensor:
        """The matrix that takes c to c', float64 [width, width]."""
        seen = right.T @ gram
        identity = torch.eye(len(gram), dtype=gram.dtype)
        return torch.linalg.solve(self.adversarial_ridge * identity + seen @ right, seen)  # type: ignore[no-any-return]
