"""SLD from its formulas: one picture, one step, one number of its noise after the other."""

from collections.abc import Callable

import torch
from torch import Tensor

Predict = Callable[[Tensor, int, Tensor], Tensor]
"""Latents [c, h, w], a timestep and a text [tokens, width] to the noise [c, h, w]."""


def weight(phi: float, difference: float, threshold: float, scaling: str) -> float:
    """mu of one number."""
    if difference >= threshold:
        return 0.0
    return min(1.0, abs(phi)) if scaling == "at_most_1" else max(1.0, abs(phi))


def guided(
    plain: Tensor,
    prompted: Tensor,
    unsafe: Tensor,
    momentum: list[float],
    *,
    guidance: float,
    warm: bool,
    safety_scale: float,
    threshold: float,
    momentum_scale: float,
    momentum_beta: float,
    scaling: str,
) -> tuple[Tensor, list[float]]:
    """The noise of one step and the momentum of the next; ``warm`` once the warm-up is over."""
    noise, later = [], []
    numbers = zip(
        plain.flatten().tolist(), prompted.flatten().tolist(), unsafe.flatten().tolist(), momentum, strict=True
    )
    for e_0, e_p, e_s, nu in numbers:
        difference = e_p - e_s
        gamma = weight(safety_scale * difference, difference, threshold, scaling) * (e_s - e_0) + momentum_scale * nu
        later.append(momentum_beta * nu + (1 - momentum_beta) * gamma)
        noise.append(e_0 + guidance * (e_p - e_0 - (gamma if warm else 0.0)))
    return torch.tensor(noise, dtype=torch.float64).reshape(plain.shape), later


def sample(
    predict: Predict,
    move: Callable[[Tensor, int, Tensor], Tensor],
    z: Tensor,
    prompt: Tensor,
    empty: Tensor,
    concept: Tensor,
    timesteps: list[int],
    *,
    guidance: float,
    warmup_steps: int,
    **settings: float | str,
) -> Tensor:
    """From noise to picture; ``move`` takes noise, a timestep and latents to the latents of the next step."""
    x, momentum = z, [0.0] * z.numel()
    for step, t in enumerate(timesteps):
        eps, momentum = guided(
            predict(x, t, empty),
            predict(x, t, prompt),
            predict(x, t, concept),
            momentum,
            guidance=guidance,
            warm=step >= warmup_steps,
            **settings,
        )
        x = move(eps, t, x)
    return x
