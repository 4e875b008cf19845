"""The one training loop: seeded by step, resumable after a kill, with an optional average of the weights."""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from diffusion.files import replacing
from diffusion.finite import NotFiniteError, require_finite
from diffusion.progress import progress_bar

log = logging.getLogger(__name__)

_DIVERGED = "the training has diverged; take a smaller learning rate"


def step_generator(seed: int, step: int) -> torch.Generator:
    """A CPU generator that depends on ``seed`` and ``step`` alone, so that a resumed run draws the same numbers."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def cosine_warmup(steps: int, warmup: int, cycles: int = 1) -> Callable[[int], float]:
    """Learning-rate factor: linear from 0 over ``warmup`` steps, then half a cosine down to 0 at ``steps``.

    With several ``cycles``, so many half cosines, each of which starts at 1 again.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if step >= steps:
            return 0.0
        return 0.5 * (1 + math.cos(math.pi * (cycles * (step - warmup) / (steps - warmup) % 1)))

    return factor


def save_atomically(state: object, path: Path) -> None:
    """Write ``state`` with ``torch.save`` under a temporary name and rename it, so that no reader sees half a file."""
    with replacing(path) as partial:
        torch.save(state, partial)


def fit(
    parameters: Sequence[Tensor],
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    optimizer: torch.optim.Optimizer,
    label: str,
    learning_rate_factor: Callable[[int], float] | None = None,
    ema_decay: float | None = None,
    clip_norm: float | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 100,
    after_step: Callable[[int], None] | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> list[float]:
    """Minimise ``loss(step)`` for ``step = 0 .. steps - 1`` and return the losses.

    Args:
        parameters: The tensors that ``optimizer`` trains; they are saved, restored and averaged.
        loss: Scalar loss of a step. It must draw its random numbers from the step alone (``step_generator``).
        steps: Number of optimiser steps.
        optimizer: A torch optimiser over ``parameters``.
        label: What the progress line says.
        learning_rate_factor: Factor on every group's initial learning rate, by step.
        ema_decay: If given, ``parameters`` end as their exponential moving average (warmed up as (1+n)/(10+n)).
        clip_norm: Largest norm of the gradient.
        checkpoint: File that the state is written to every ``checkpoint_every`` steps and resumed from.
        checkpoint_every: Steps between two writes.
        after_step: Called after each optimiser step.
        scaler: For gradients that pass through float16: it scales the loss so that they do not underflow, and leaves
            out a step whose gradients overflow.

    Raises:
        NotFiniteError: A loss, a gradient or what is trained is infinite or NaN, or no gradient fits float16.
    """
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    averages = [parameter.detach().clone() for parameter in parameters] if ema_decay is not None else []
    schedule = LambdaLR(optimizer, learning_rate_factor or (lambda _: 1.0))
    losses: list[float] = []
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        scaler.load_state_dict(state.get("scaler", {}))
        losses = state["losses"]
        _copy(state["tensors"], [*parameters, *averages])
        log.info("%s: resumed at step %d of %d", label, len(losses), steps)

    first, left_out = len(losses), 0
    with progress_bar(label, steps, done=first) as bar:
        for step in range(len(losses), steps):
            optimizer.zero_grad(set_to_none=True)
            step_loss = loss(step)
            losses.append(float(step_loss.detach()))
            place = f"{label} at step {step + 1} of {steps}"
            require_finite(losses[-1], f"The loss of {place}", _DIVERGED)
            scaler.scale(step_loss).backward()  # type: ignore[no-untyped-call]
            if clip_norm is not None:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
            if not scaler.is_enabled():
                _require_finite_gradients(parameters, place)
            scaler.step(optimizer)
            scale = scaler.get_scale()
            scaler.update()
            left_out += scaler.get_scale() < scale
            schedule.step()
            if after_step is not None:
                after_step(step)
            if ema_decay is not None:
                _update_averages(averages, parameters, min(ema_decay, (1 + step) / (10 + step)))
            bar.advance()
            bar.note(f"loss {fmean(losses[-50:]):.4f}")
            if checkpoint is not None and (step + 1) % checkpoint_every == 0 and step + 1 < steps:
                state = {
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "scaler": scaler.state_dict(),
                    "losses": losses,
                    "tensors": [tensor.detach() for tensor in [*parameters, *averages]],
                }
                save_atomically(state, checkpoint)
    if 0 < steps - first == left_out:
        remedy = "no step was taken, so train in float32 or bfloat16 arithmetic"
        raise NotFiniteError(f"Every gradient of {label} overflows float16; {remedy}.")
    _copy(averages, parameters[: len(averages)])
    for parameter in parameters:
        require_finite(parameter.detach(), f"What {label} has trained", _DIVERGED)
    return losses


def _require_finite_gradients(parameters: Sequence[Tensor], place: str) -> None:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients:
        largest = torch.nn.utils.get_total_norm(gradients, math.inf)
        require_finite(largest, f"The largest gradient of {place}", _DIVERGED)


@torch.no_grad()
def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


@torch.no_grad()
def _update_averages(averages: Sequence[Tensor], parameters: Sequence[Tensor], decay: float) -> None:
    for average, parameter in zip(averages, parameters, strict=True):
        average.lerp_(parameter, 1 - decay)
