"""Scores of how well pictures fit their prompts, picture by picture."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from evaluation.prompt_sets import PromptRow
from evaluation.quality import Measures
from evaluation.statistics import Mean


class TextScores:
    """The scores of the edited and of the base model's pictures so far.

    Args:
        name: What results call the mean of the edited model's; with ``_base`` behind it, of the base model's.
        score: Scores of pictures uint8 [n, 3, H, W] and their n prompts, float [n].
    """

    def __init__(self, name: str, score: Callable[[Tensor, Sequence[str]], Tensor]) -> None:
        self._score = score
        self._scores: dict[str, list[float]] = {name: [], f"{name}_base": []}

    def update(self, images: Tensor, reference_images: Tensor, rows: Sequence[PromptRow]) -> None:
        """See :class:`evaluation.quality.Measurement`."""
        prompts = [row.prompt for row in rows]
        for scores, pictures in zip(self._scores.values(), (images, reference_images), strict=True):
            scores.extend(self._score(pictures, prompts).tolist())

    def compute(self) -> Measures:
        """The means as dicts."""
        return {name: Mean.of(scores).as_dict() for name, scores in self._scores.items()}

    def state(self) -> dict[str, Any]:
        """The scores by measure."""
        return dict(self._scores)

    def restore(self, state: dict[str, Any]) -> None:
        """See :class:`evaluation.quality.Measurement`."""
        self._scores = dict(state)
