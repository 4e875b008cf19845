"""Scores of how well pictures fit their prompts, picture by picture."""

from collections.abc import Callable, Sequence

from torch import Tensor

from evaluation.prompt_sets import PromptRow
from evaluation.quality.collected import Collected
from evaluation.statistics import Mean


def text_scores(name: str, score: Callable[[Tensor, Sequence[str]], Tensor]) -> Collected:
    """Measure the mean scores of the edited and of the base model's pictures.

    Args:
        name: What results call the mean of the edited model's; with ``_base`` behind it, of the base model's.
        score: Scores of pictures uint8 [n, 3, H, W] and their n prompts, float [n].
    """

    def values(images: Tensor, reference_images: Tensor, rows: Sequence[PromptRow]) -> dict[str, list[float]]:
        prompts = [row.prompt for row in rows]
        return {name: score(images, prompts).tolist(), f"{name}_base": score(reference_images, prompts).tolist()}

    return Collected(values, Mean.of)
