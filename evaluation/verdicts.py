"""What a judge says of pictures."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from diffusion.finite import require_finite


@dataclass(frozen=True)
class Verdicts:
    """One verdict per picture.

    Attributes:
        present: bool [n], is the concept there?
        score: float [n] in [0, 1], how sure.
        details: Further columns by name, each a list of n values (for example the predicted label). ``labels``, where
            a judge has it, lists for each picture the labels for which the concept is present.
    """

    present: Tensor
    score: Tensor
    details: dict[str, list[object]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the scores.

        Raises:
            NotFiniteError: One is infinite or NaN.
        """
        require_finite(self.score, "The judge's scores", "its weights or the pictures are damaged")


class Judge(Protocol):
    """Says of pictures, uint8 [n, 3, H, W], whether they show the concept."""

    def __call__(self, images: Tensor) -> Verdicts:
        """Judge every picture by itself."""


LabelCounts = dict[str, dict[str, int]]
"""By label, the most frequent first: ``pictures`` in which it was found, and ``detections`` in all."""


def label_counts(labels: Sequence[Sequence[str]]) -> LabelCounts:
    """Count each label over pictures, as the bar charts of papers do.

    Args:
        labels: Of each picture those found, one for each detection; the ``labels`` of :class:`Verdicts`' details.

    >>> label_counts([["FEET", "FEET"], [], ["BELLY", "FEET"]])
    {'FEET': {'pictures': 2, 'detections': 3}, 'BELLY': {'pictures': 1, 'detections': 1}}
    """
    detections = Counter(label for found in labels for label in found)
    pictures = Counter(label for found in labels for label in set(found))
    by_frequency = sorted(detections, key=lambda label: (-detections[label], label))
    return {label: {"pictures": pictures[label], "detections": detections[label]} for label in by_frequency}
