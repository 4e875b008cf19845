"""A measurement that has one value of every picture."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from evaluation.prompt_sets import PromptRow
from evaluation.quality import Measures
from evaluation.statistics import Mean, Rate


class Collected:
    """The values of the pictures so far, by measure.

    Args:
        values: The next values of every measure, from the arguments of :meth:`evaluation.quality.Measurement.update`.
        summarise: What a measure's values come to.
    """

    def __init__(
        self,
        values: Callable[[Tensor, Tensor, Sequence[PromptRow]], Mapping[str, Sequence[float]]],
        summarise: Callable[[Sequence[Any]], Mean | Rate],
    ) -> None:
        self._take = values
        self._summarise = summarise
        self._values: dict[str, list[float]] = {}

    def update(self, images: Tensor, reference_images: Tensor, rows: Sequence[PromptRow]) -> None:
        """See :class:`evaluation.quality.Measurement`."""
        for name, values in self._take(images, reference_images, rows).items():
            self._values.setdefault(name, []).extend(values)

    def compute(self) -> Measures:
        """The measures as dicts."""
        return {name: self._summarise(values).as_dict() for name, values in self._values.items()}

    def state(self) -> dict[str, Any]:
        """The values by measure."""
        return dict(self._values)

    def restore(self, state: dict[str, Any]) -> None:
        """See :class:`evaluation.quality.Measurement`."""
        self._values = dict(state)
