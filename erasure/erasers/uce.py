"""UCE: keys and values of the concept become the anchor's, in closed form."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from diffusion.model import TextToImage
from erasure.closed_form import ClosedForm, Term, right_multiplication
from erasure.concept import Concept


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class UCE(ClosedForm):
    """Unified Concept Editing (Gandikota et al., "Unified Concept Editing in Diffusion Models", WACV 2024).

    For every key and value matrix W of cross-attention (their equation 7, solved in :mod:`erasure.closed_form`):
    min sum_e s_e || W' c_e - W c_g ||^2 + sum_p s_p || W' c_p - W c_p ||^2 + lambda || W' - W ||^2
    with c_e the concept's targets in every template, c_g the anchor in the same template, c_p what is preserved.

    Attributes:
        tokens: Which embeddings of a phrase are the c: ``last``, that of its last token before the end token (the
            authors' code of 2025); or ``from_last``, that one and all after it, paired in order, with all tokens of
            the preserved prompts and of the empty one (the authors' code of 2023).
        ridge: lambda.
        erase_scale: s_e.
        preserve_scale: s_p; None for max(0.1, 1 / number of preserved prompts, the empty one included), as in the
            code of 2023.
    """

    tokens: Literal["last", "from_last"] = "last"
    ridge: Annotated[float, Field(gt=0)] = 0.5
    erase_scale: Annotated[float, Field(gt=0)] = 1.0
    preserve_scale: Annotated[float, Field(ge=0)] | None = 1.0

    def right_multiplication(self, model: TextToImage, concept: Concept) -> Tensor:
        """See :class:`erasure.closed_form.ClosedForm`."""
        return right_multiplication([self._erasing(model, concept), *self._keeping(model, concept)], self.ridge)

    def _erasing(self, model: TextToImage, concept: Concept) -> Term:
        targets = _from_last_subject_token(model, concept.target_prompts)
        anchors = _from_last_subject_token(model, concept.target_anchors)
        lengths = [
            1 if self.tokens == "last" else min(len(target), len(anchor))
            for target, anchor in zip(targets, anchors, strict=True)
        ]
        sources, destinations = (
            torch.cat([phrase[:length] for phrase, length in zip(phrases, lengths, strict=True)])
            for phrases in (targets, anchors)
        )
        return Term(sources, destinations, self.erase_scale)

    def _keeping(self, model: TextToImage, concept: Concept) -> list[Term]:
        prompts = concept.preserved_prompts
        scale = max(0.1, 1 / (1 + len(prompts))) if self.preserve_scale is None else self.preserve_scale
        if self.tokens == "from_last":
            return [Term.keeping(model.encode_prompts(["", *prompts]).flatten(0, 1), scale)]
        if not prompts:
            return []
        kept = [tokens[:1] for tokens in _from_last_subject_token(model, prompts)]
        return [Term.keeping(torch.cat(kept), scale)]


def _from_last_subject_token(model: TextToImage, prompts: Sequence[str]) -> list[Tensor]:
    """Embeddings of each prompt from the token before its end token on, float [any, width]; from the start if empty."""
    ends = [ids.index(model.tokenizer.eos_token_id) for ids in model.tokenize(prompts).tolist()]
    return [text[end - 1 :] for text, end in zip(model.encode_prompts(prompts), ends, strict=True)]
