"""Retained accuracy: how often pictures of other prompts still show what they ask for."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor

from diffusion.canvas.classifier import HEADS
from diffusion.checked import checked
from evaluation.judges.canvas import CLASSIFIER_FOLDER, ClassifierFolder, Head, classify, load_classifier
from evaluation.prompt_sets import PromptRow
from evaluation.quality.collected import Collected
from evaluation.statistics import Rate


@checked
class RetainedAccuracy:
    """How often the canvas classifier reads off a picture what its prompt names.

    Attributes:
        heads: Properties to compare; the prompt set must have a column of that name for each.
        folder: The classifier; null for the shipped one.
    """

    heads: Annotated[tuple[Head, ...], Field(min_length=1)] = ("style", "subject")
    folder: ClassifierFolder = CLASSIFIER_FOLDER

    def rates(self, images: Tensor, rows: Sequence[PromptRow]) -> dict[str, Rate]:
        """The rate of :meth:`agreement` for each head."""
        return {head: Rate.of(agrees) for head, agrees in self.agreement(images, rows).items()}

    def agreement(self, images: Tensor, rows: Sequence[PromptRow]) -> dict[str, list[bool]]:
        """Which of the uint8 pictures [n, 3, H, W] agree with the labels of their prompts, for each head.

        Raises:
            ValueError: A prompt lacks a head's label, or has one that the classifier does not know.
        """
        probabilities = classify(load_classifier(self.folder), images)
        agreement: dict[str, list[bool]] = {}
        for head in self.heads:
            predicted = [HEADS[head][index] for index in probabilities[head].argmax(dim=1).tolist()]
            wanted = [_label(row, head) for row in rows]
            agreement[head] = [one == other for one, other in zip(predicted, wanted, strict=True)]
        return agreement

    def check_labels(self, rows: Sequence[PromptRow]) -> None:
        """See :class:`evaluation.quality.ReadsLabels`."""
        for row in rows:
            for head in self.heads:
                _label(row, head)

    def start(self) -> Collected:
        """Measure ``accuracy_<head>`` of the edited model and ``accuracy_<head>_base``, each a :class:`Rate`."""
        return Collected(self._outcomes, Rate.of)

    def _outcomes(self, images: Tensor, reference_images: Tensor, rows: Sequence[PromptRow]) -> dict[str, list[bool]]:
        return {
            f"accuracy_{head}{suffix}": agrees
            for suffix, pictures in (("", images), ("_base", reference_images))
            for head, agrees in self.agreement(pictures, rows).items()
        }


def _label(row: PromptRow, head: Head) -> str:
    label = row.labels.get(head)
    if head == "burning" and label in {"0", "1"}:
        return HEADS[head][int(label)]
    if label not in HEADS[head]:
        raise ValueError(
            f"Prompt {row.case_number} has the {head} {label!r}; retained accuracy needs a column {head} with one of "
            f"{', '.join(HEADS[head])}, as the canvas's prompt sets have; choose another evaluator for other prompts."
        )
    return label
