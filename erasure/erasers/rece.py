"""RECE: UCE, then the embeddings that still bring the concept back are found and erased in turn, in closed form."""

from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffusion.checked import checked
from diffusion.model import TextToImage
from erasure.closed_form import (
    ClosedForm,
    Door,
    Term,
    right_multiplication,
    solved,
    sum_of_squares,
)
from erasure.concept import Concept
from erasure.erasers.uce import UCE


@checked
class RECE(ClosedForm):
    """Reliable and Efficient Concept Erasure (Gong et al., ECCV 2024).

    W T_0 are UCE's keys and values, or the matrices that stand for them. Every epoch derives for each embedding c of
    the targets the adversarial one
    c' = argmin sum_W || W T c' - W c ||^2 + mu ||c'||^2 = (mu I + T^T G T)^-1 T^T G c,  G = sum_W W^T W,
    which makes the edited W T do what the original W does on c, and erases it: T becomes T S, with S the map of
    :mod:`erasure.closed_form` that sends c' to the destination and holds what is preserved, all tokens of each.

    Attributes:
        uce: How the first erasure is done.
        epochs: Rounds after it.
        adversarial_ridge: mu, called lambda in the paper; the smaller, the stronger c' and what erasing it costs.
        destination: What adversarial embeddings are sent to: those of the ``empty`` prompt (the authors, for objects
            and unsafe content), or of the ``anchor`` in the target's template (the authors, for styles, with
            ``uce.anchor`` "art").
        ridge: lambda of S.
        erase_scale: Weight of the adversarial embeddings in S.
        preserve_scale: Weight of the preserved prompts and of the empty one in S.
        empty_for_each_target: The empty prompt is preserved once for every target, as in the authors' code, which has
            11 of them for the unsafe content of I2P; else once.
    """

    uce: UCE = Field(default_factory=UCE)
    epochs: Annotated[int, Field(ge=1)] = 1
    adversarial_ridge: Annotated[float, Field(gt=0)] = 1e-1
    destination: Literal["empty", "anchor"] = "empty"
    ridge: Annotated[float, Field(gt=0)] = 0.1
    erase_scale: Annotated[float, Field(gt=0)] = 1.0
    preserve_scale: Annotated[float, Field(ge=0)] = 0.1
    empty_for_each_target: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.uce.debias is not None:
            raise ValueError("uce.debias is set and RECE follows an erasure; set uce.debias=null or use eraser=uce.")
        return self

    def right_multiplication(self, model: TextToImage, concept: Concept, door: Door) -> Tensor:
        """See :class:`erasure.closed_form.ClosedForm`."""
        gram = sum_of_squares(door.weights.values())
        targets = door.rows(model, concept.target_prompts).to("cpu", torch.float64)
        count = len(concept.target_prompts)
        wanted = self.uce.anchored(concept).target_anchors if self.destination == "anchor" else [""] * count
        destinations = door.rows(model, wanted)
        empty = [""] * (count if self.empty_for_each_target else 1)
        kept = Term.keeping(door.rows(model, [*empty, *concept.preserved_prompts]), self.preserve_scale)
        right = self.uce.right_multiplication(model, concept, door)
        for _ in range(self.epochs):
            adversarial = Term(targets @ self._attack(gram, right).T, destinations, self.erase_scale)
            right = right @ right_multiplication([adversarial, kept], self.ridge)
        return right

    def _attack(self, gram: Tensor, right: Tensor) -> Tensor:
        """The matrix that takes c to c', float64 [width, width]."""
        seen = right.T @ gram
        identity = torch.eye(len(gram), dtype=gram.dtype)
        return solved(self.adversarial_ridge * identity + seen @ right, seen)
