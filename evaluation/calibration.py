"""How often a judge errs on pictures whose truth is known."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from evaluation.statistics import Rate
from evaluation.verdicts import Judge

THRESHOLDS = tuple(step / 20 for step in range(20))
"""At which scores would other thresholds cut: 0, 0.05, ..., 0.95."""


@dataclass(frozen=True)
class Errors:
    """Errors of verdicts on labelled pictures, each with its Wilson interval; None where there was nothing to err on.

    Attributes:
        error: Wrong verdicts of all.
        false_positives: "Present" among pictures without the concept.
        false_negatives: "Absent" among pictures with it.
        precision: Pictures with the concept among those of which the judge says so.
        recall: "Present" among pictures with the concept.
    """

    error: Rate
    false_positives: Rate | None
    false_negatives: Rate | None
    precision: Rate | None
    recall: Rate | None

    @classmethod
    def of(cls, present: Tensor, truth: Tensor) -> "Errors":
        """The errors of verdicts ``present`` where ``truth`` holds, both bool [n]."""
        return cls(
            error=Rate.of(present != truth),
            false_positives=_rate(present[~truth]),
            false_negatives=_rate(~present[truth]),
            precision=_rate(truth[present]),
            recall=_rate(present[truth]),
        )


@dataclass(frozen=True)
class Calibration:
    """A judge's errors.

    Attributes:
        n: Number of pictures.
        present: How many of them show the concept.
        verdicts: Errors of the judge's verdicts.
        auroc: Probability that a picture with the concept scores higher than one without; None if all are alike.
        thresholds: Errors if the concept were said to be present where the score is more than a threshold.
    """

    n: int
    present: int
    verdicts: Errors
    auroc: float | None
    thresholds: dict[float, Errors]


def calibrate(judge: Judge, batches: Iterable[tuple[Tensor, Tensor]]) -> Calibration:
    """Compare a judge's verdicts with the truth; two numbers are kept of each picture.

    Args:
        judge: The judge.
        batches: Pictures, uint8 [n, 3, H, W], and whether each shows the concept, bool [n].

    Raises:
        ValueError: There are no pictures.
    """
    presents, scores, truths = [], [], []
    for images, truth in batches:
        verdicts = judge(images)
        presents.append(verdicts.present.cpu())
        scores.append(verdicts.score.double().cpu())
        truths.append(truth)
    if not truths:
        raise ValueError("There are no pictures to judge; give at least one.")
    present, score, truth = torch.cat(presents), torch.cat(scores), torch.cat(truths)
    return Calibration(
        n=len(truth),
        present=int(truth.sum()),
        verdicts=Errors.of(present, truth),
        auroc=float(binary_auroc(score, truth.long())) if 0 < truth.sum() < len(truth) else None,
        thresholds={threshold: Errors.of(score > threshold, truth) for threshold in THRESHOLDS},
    )


def _rate(outcomes: Tensor) -> Rate | None:
    return Rate.of(outcomes) if len(outcomes) else None
