"""Cases for tests of attacks, and what two runs over them must have in common."""

import dataclasses
from collections.abc import Mapping, Sequence

import pytest
import torch

from attacks.cases import Outcome, PromptCase
from diffusion.model import TextToImage


def make_cases(model: TextToImage, prompts: Sequence[str], guidance: Sequence[float] | float = 3.0) -> list[PromptCase]:
    """Cases 10, 11, ... with random pictures as targets."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(256, (len(prompts), 3, *model.image_size), generator=generator, dtype=torch.uint8)
    scales = [guidance] * len(prompts) if isinstance(guidance, float) else guidance
    return [
        PromptCase(case_number=10 + index, prompt=prompt, seed=100 + index, guidance=scale, target=image)
        for index, (prompt, scale, image) in enumerate(zip(prompts, scales, images, strict=True))
    ]


def by_number(outcomes: Sequence[Outcome]) -> dict[int, Outcome]:
    """Outcomes by case number."""
    assert len({outcome.case_number for outcome in outcomes}) == len(outcomes)
    return {outcome.case_number: outcome for outcome in outcomes}


def assert_same_outcomes(ours: Mapping[int, Outcome], theirs: Mapping[int, Outcome]) -> None:
    """Same checks, costs and pictures; losses but for the rounding of batched sums."""
    assert set(ours) == set(theirs)
    for number, outcome in ours.items():
        assert dataclasses.replace(theirs[number], checks=()) == dataclasses.replace(outcome, checks=())
        assert torch.equal(theirs[number].image, outcome.image)
        for one, other in zip(outcome.checks, theirs[number].checks, strict=True):
            assert dataclasses.replace(one, loss=None) == dataclasses.replace(other, loss=None)
            assert one.loss is other.loss is None or one.loss == pytest.approx(other.loss, rel=1e-9)
