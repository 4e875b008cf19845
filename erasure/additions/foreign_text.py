"""A foreign prompt in the place of every other."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from diffusion.guard import Encode, Guard
from diffusion.model import TextToImage
from erasure.addition import Addition, set_guard


@dataclass(frozen=True, eq=False)
class ForeignText(Addition):
    """What a foreign prompt adds to a model; see :class:`erasure.erasers.foreign_prompt.ForeignPrompt`.

    Attributes:
        text: float [tokens, width], the foreign prompt as the model encodes it.
    """

    kind: ClassVar[str] = "foreign_text"
    is_guard: ClassVar[bool] = True

    text: Tensor

    def settings(self) -> dict[str, Any]:
        """See :class:`erasure.addition.Addition`."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`erasure.addition.Addition`."""
        return {"text": self.text}

    @classmethod
    def restored(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """See :class:`erasure.addition.Addition`."""
        return cls(tensors["text"], **settings)

    def attach(self, model: TextToImage) -> Callable[[], None]:
        """See :class:`erasure.addition.Addition`."""
        if tuple(self.text.shape) != model.text_shape:
            raise ValueError(
                f"The foreign prompt was encoded to {list(self.text.shape)} and {model.name!r} encodes to "
                f"{list(model.text_shape)}; load the model that the edit was made from."
            )
        return set_guard(model, RedirectingGuard(self.text.to(model.device, model.dtype)))


class RedirectingGuard(Guard):
    """Reads every prompt but the empty one as the foreign one.

    Args:
        text: float [tokens, width], of the foreign prompt.
    """

    def __init__(self, text: Tensor) -> None:
        self.text = text

    def read(self, token_embeddings: Tensor, eos_positions: Tensor, encode: Encode) -> Tensor:
        """See :class:`diffusion.guard.Guard`; what is redirected has a gradient of 0."""
        text = encode(token_embeddings, eos_positions)
        # An empty prompt ends right after its start, and stays, so that guidance still has two sides.
        redirected = (eos_positions > 1)[:, None, None]
        return torch.where(redirected, self.text.expand_as(text), text)
