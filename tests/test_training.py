"""The training loop: a killed run resumes to the same weights, and averages are what they say."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffusion.streams import stream
from diffusion.training import cosine_warmup, fit


class Killed(Exception):
    """Stands in for kill -9."""


def _run(steps: int, checkpoint: Path | None, *, die_at: int | None = None) -> tuple[Tensor, list[float]]:
    weight = torch.zeros(3, requires_grad=True)

    def loss(step: int) -> Tensor:
        if step == die_at:
            raise Killed
        return (weight - torch.randn(3, generator=stream(5, "test", step))).square().sum()

    losses = fit(
        [weight],
        loss,
        steps=steps,
        optimizer=torch.optim.Adam([weight], lr=0.1),
        learning_rate_factor=cosine_warmup(steps, warmup=3),
        ema_decay=0.9,
        checkpoint=checkpoint,
        checkpoint_every=4,
        label="test",
    )
    return weight.detach(), losses


def test_killed_run_resumes_to_the_same_weights_bit_for_bit(tmp_path: Path):
    undisturbed, losses = _run(20, None)
    with pytest.raises(Killed):
        _run(20, tmp_path / "state", die_at=14)
    resumed, resumed_losses = _run(20, tmp_path / "state")
    assert torch.equal(resumed, undisturbed)
    assert resumed_losses == losses


def test_average_follows_its_recursion():
    weight = torch.zeros(1, requires_grad=True)
    seen: list[float] = []
    fit(
        [weight],
        lambda _: (weight - 1).square().sum(),
        steps=6,
        optimizer=torch.optim.SGD([weight], lr=0.2),
        ema_decay=0.5,
        after_step=lambda _: seen.append(weight.item()),
        label="test",
    )
    average = 0.0
    for step, value in enumerate(seen):
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * value
    assert weight.item() == pytest.approx(average, rel=1e-6)


def test_cosine_warmup_rises_then_falls_to_zero():
    factor = cosine_warmup(100, warmup=10)
    assert factor(0) == pytest.approx(0.1)
    assert factor(10) == pytest.approx(1.0)
    assert factor(55) == pytest.approx(0.5)
    assert factor(100) == pytest.approx(0.0)


def test_cosine_warmup_starts_again_with_every_cycle():
    factor = cosine_warmup(100, warmup=10, cycles=3)
    assert [factor(step) for step in (10, 40, 70)] == pytest.approx([1.0] * 3)
    assert [factor(step) for step in (25, 55, 85)] == pytest.approx([0.5] * 3)
    assert factor(99) < 0.01
    assert factor(100) == 0.0
