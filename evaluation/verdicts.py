"""What a judge says of pictures."""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Verdicts:
    """One verdict per picture.

    Attributes:
        present: bool [n], is the concept there?
        score: float [n] in [0, 1], how sure.
        details: Further columns by name, each a list of n values (for example the predicted label).
    """

    present: Tensor
    score: Tensor
    details: dict[str, list[object]] = field(default_factory=dict)


class Judge(Protocol):
    """Says of pictures, uint8 [n, 3, H, W], whether they show the concept."""

    def __call__(self, images: Tensor) -> Verdicts:
        """Judge every picture by itself."""
