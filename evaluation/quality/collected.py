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
        summarise: What a measure's values come to, given each one's prompt: pictures of one are not independent.
    """

    def __init__(
        self,
        values: Callable[[Tensor, Tensor, Sequence[PromptRow]], Mapping[str, Sequence[float]]],
        summarise: Callable[[Sequence[Any], Sequence[str]], Mean | Rate],
    ) -> None:
        self._take = values
        self._summarise = summarise
        self._values: dict[str, list[float]] = {}
        self._prompts: list[str] = []

    def update(self, images: Tensor, reference_images: Tensor, rows: Sequence[PromptRow]) -> None:
        """See :class:`evaluation.quality.Measurement`."""
        for name, values in self._take(images, reference_images, rows).items():
            self._values.setdefault(name, []).extend(values)
        self._prompts.extend(row.prompt for row in rows)

    def compute(self) -> Measures:
        """The measures as dicts."""
        return {name: self._summarise(values, self._prompts).as_dict() for name, values in self._values.items()}

    def state(self) -> dict[str, Any]:
        """The values by measure, and their prompts."""
        return {"values": dict(self._values), "prompts": list(self._prompts)}

    def restore(self, state: dict[str, Any]) -> None:
        """See :class:`evaluation.quality.Measurement`."""
        self._values, self._prompts = dict(state["values"]), list(state["prompts"])
