"""Judges for tests of attacks."""

import torch

from evaluation.verdicts import Judge, Verdicts


def never(images: torch.Tensor) -> Verdicts:
    """A judge that never finds the concept."""
    return Verdicts(torch.zeros(len(images), dtype=torch.bool), torch.zeros(len(images)))


def one_in(several: int) -> Judge:
    """A judge whose verdict is a fixed, erratic function of each picture: about one in several shows the concept."""

    def judge(images: torch.Tensor) -> Verdicts:
        sums = images.long().sum(dim=(1, 2, 3))
        return Verdicts(sums % several == 0, (sums % 101) / 100)

    return judge
