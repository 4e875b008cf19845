"""The one training loop: seeded by step, resumable after a kill, with an optional average of the weights."""

import logging
import math
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from diffusion.files import replacing, set_aside
from diffusion.finite import NotFiniteError, require_finite
from diffusion.progress import progress_bar

log = logging.getLogger(__name__)

_DIVERGED = "the training has diverged; take a smaller learning rate"


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


def read_saved(path: Path, device: torch.device | None = None) -> Any:
    """What :func:`save_atomically` wrote, with its tensors on ``device``; None if there is no file.

    A damaged file is set aside, so that what it held is computed again: torch's own reader does not look at the
    checksums that every record of such a file has.
    """
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as records:
            if (damaged := records.testzip()) is not None:
                raise zipfile.BadZipFile(f"the checksum of {damaged} does not fit")
        return torch.load(path, weights_only=True, map_location=device)
    except torch.OutOfMemoryError:
        raise
    except (zipfile.BadZipFile, UnpicklingError, EOFError, RuntimeError, ValueError, KeyError) as error:
        set_aside(path, " ".join(str(error).split()[:20]))
        return None


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
        loss: Scalar loss of a step. It must draw its random numbers from a stream of that step
            (:mod:`diffusion.streams`), so that a resumed run draws the same.
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
    state = None if checkpoint is None else read_saved(checkpoint)
    if checkpoint is not None and state is not None:
        if problem := _unlike(state, [*parameters, *averages], steps):
            set_aside(checkpoint, problem)
        else:
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            scaler.load_state_dict(state["scaler"])
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
            bar.note(f"loss {fmean(losses[-50:]):.4f}", losses[-1])
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


def _unlike(state: Any, tensors: Sequence[Tensor], steps: int) -> str:
    """Why ``state`` is no checkpoint of a training of ``tensors`` over so many steps; empty if it is one."""
    fields = {"optimizer", "schedule", "scaler", "losses", "tensors"}
    if not isinstance(state, dict) or state.keys() != fields:
        return "it is no checkpoint of a training"
    if [tensor.shape for tensor in state["tensors"]] != [tensor.shape for tensor in tensors]:
        return "it is the checkpoint of a training of other weights"
    if len(state["losses"]) >= steps:
        return f"it has {len(state['losses'])} steps done of {steps}"
    return ""


@torch.no_grad()
def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


@torch.no_grad()
def _update_averages(averages: Sequence[Tensor], parameters: Sequence[Tensor], decay: float) -> None:
    for average, parameter in zip(averages, parameters, strict=True):
        average.lerp_(parameter, 1 - decay)
