"""The judge of the canvas: the classifier that was trained on its drawn pictures."""

from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, model_validator
from torch import Tensor

from diffusion.canvas.classifier import HEADS, CanvasClassifier
from diffusion.checked import checked
from diffusion.files import why_unreadable
from diffusion.sources import CANVAS_FOLDER
from diffusion.weight_files import LOADING_ERRORS
from evaluation.verdicts import Verdicts

Head = Literal["style", "subject", "burning"]

CLASSIFIER_FOLDER = CANVAS_FOLDER / "classifier"
"""The shipped classifier."""

ClassifierFolder = Annotated[Path, BeforeValidator(lambda folder: CLASSIFIER_FOLDER if folder is None else folder)]
"""Folder of a :class:`CanvasClassifier`; None means the shipped one."""

_BATCH = 256


@lru_cache(maxsize=4)
def load_classifier(folder: Path = CLASSIFIER_FOLDER) -> CanvasClassifier:
    """The classifier in ``folder``, read once per process.

    Raises:
        FileNotFoundError: ``folder`` holds no classifier.
        ValueError: Its files are damaged, or it was trained for other labels.
    """
    try:
        return CanvasClassifier.from_pretrained(folder)
    except FileNotFoundError:
        raise
    except LOADING_ERRORS as error:
        raise ValueError(f"The classifier in {folder} cannot be read: {why_unreadable(folder, error)}.") from error


@torch.no_grad()
def classify(classifier: CanvasClassifier, images: Tensor) -> dict[str, Tensor]:
    """Class probabilities of every head, float [n, labels] on the CPU, of uint8 ``images`` [n, 3, H, W]."""
    logits = [classifier(chunk.cpu()) for chunk in images.split(_BATCH)]
    return {head: torch.cat([chunk[head] for chunk in logits]).softmax(dim=1) for head in HEADS}


@checked
class CanvasJudge:
    """Says that the concept is present where a head's most likely label is ``label``; the score is its probability.

    Attributes:
        head: Which property of the picture is read.
        label: The value of that property which counts as the concept ("van_gogh", "church", "yes").
        folder: The classifier; null for the shipped one.

    Raises:
        ValueError: The head has no such label.
    """

    head: Head
    label: str
    folder: ClassifierFolder = CLASSIFIER_FOLDER

    @model_validator(mode="after")
    def _label_exists(self) -> "CanvasJudge":
        if self.label not in HEADS[self.head]:
            raise ValueError(
                f"label is {self.label!r}; the canvas judge's head {self.head!r} knows {', '.join(HEADS[self.head])}."
            )
        return self

    def __call__(self, images: Tensor) -> Verdicts:
        """Judge uint8 pictures [n, 3, H, W]; ``details`` names each picture's most likely ``label``.

        Raises:
            FileNotFoundError: ``folder`` holds no classifier.
        """
        labels = HEADS[self.head]
        probabilities = classify(load_classifier(self.folder), images)[self.head]
        predicted = [labels[index] for index in probabilities.argmax(dim=1).tolist()]
        return Verdicts(
            present=torch.tensor([label == self.label for label in predicted], dtype=torch.bool),
            score=probabilities[:, labels.index(self.label)],
            details={"label": list(predicted)},
        )
