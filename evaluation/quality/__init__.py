"""Evaluators: what an edit leaves of the model's other abilities."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from evaluation.prompt_sets import PromptRow

Measures = dict[str, float | dict[str, float]]
"""Numbers by name, ready for JSON; what has an interval is a dict with its fields."""


class Evaluator(Protocol):
    """Measures pictures of retained prompts."""

    def __call__(self, images: Tensor, reference_images: Tensor, rows: Sequence[PromptRow]) -> Measures:
        """Measure the edited model's pictures beside the base model's.

        Args:
            images: uint8 [n, 3, H, W], by the edited model.
            reference_images: uint8 [n, 3, H, W], by the base model from the same prompts, seeds and guidance.
            rows: The n prompts.

        Returns:
            Numbers by name; those that end in ``_base`` are the base model's.
        """
