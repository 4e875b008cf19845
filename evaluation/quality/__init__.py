"""Evaluators: what an edit leaves of the model's other abilities."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from evaluation.prompt_sets import PromptRow

Measures = dict[str, float | dict[str, float]]
"""Numbers by name, ready for JSON; what has an interval is a dict with its fields."""


class Measurement(Protocol):
    """Takes pictures of retained prompts part by part, and has their numbers in the end."""

    def update(self, images: Tensor, reference_images: Tensor, rows: Sequence[PromptRow]) -> None:
        """Take the next pictures.

        Args:
            images: uint8 [n, 3, H, W], by the edited model.
            reference_images: uint8 [n, 3, H, W], by the base model from the same prompts, seeds and guidance.
            rows: The n prompts.
        """

    def compute(self) -> Measures:
        """Numbers by name; those that end in ``_base`` are the base model's."""

    def state(self) -> dict[str, Any]:
        """What has been taken so far, as tensors, numbers and lists of them."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""


class Evaluator(Protocol):
    """The settings of a measurement."""

    def start(self) -> Measurement:
        """Begin with no pictures."""


@runtime_checkable
class ReadsLabels(Protocol):
    """An evaluator that needs labels of the prompts."""

    def check_labels(self, rows: Sequence[PromptRow]) -> None:
        """Refuse prompts without them.

        Raises:
            ValueError: A label is missing or unknown.
        """


def measure(evaluator: Evaluator, images: Tensor, reference_images: Tensor, rows: Sequence[PromptRow]) -> Measures:
    """The numbers of pictures that are all in hand; see :class:`Measurement`."""
    measurement = evaluator.start()
    measurement.update(images, reference_images, rows)
    return measurement.compute()
