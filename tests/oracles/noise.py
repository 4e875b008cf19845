"""Noise attacks on one picture from their formulas: DDIM as a loop, gradient steps, projections by plane geometry."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from diffusion.model import TextToImage

Predict = Callable[[Tensor, int], Tensor]


def predictor(model: TextToImage, prompt: str, guidance: float) -> Predict:
    """Noise in latents [c, h, w] at a timestep: e_0 + guidance (e_c - e_0), each half by itself."""
    text, nothing = model.encode([prompt]).detach(), model.encode([""]).detach()

    def predict(x: Tensor, t: int) -> Tensor:
        conditional = model.predict(x[None], t, text)[0]
        if guidance == 1:
            return conditional
        return (1 - guidance) * model.predict(x[None], t, nothing)[0] + guidance * conditional

    return predict


def levels(model: TextToImage, timesteps: list[int]) -> list[float]:
    """abar at each timestep, and where the last step ends: at that of the first timestep of all."""
    return [float(model.process.alphas[t]) for t in [*timesteps, 0]]


def sample(model: TextToImage, predict: Predict, z: Tensor, timesteps: list[int]) -> Tensor:
    """G(z): the DDIM sampler from noise to picture."""
    abar, x = levels(model, timesteps), z
    for step, t in enumerate(timesteps):
        eps = predict(x, t)
        x0 = (x - math.sqrt(1 - abar[step]) * eps) / math.sqrt(abar[step])
        x = math.sqrt(abar[step + 1]) * x0 + math.sqrt(1 - abar[step + 1]) * eps
    return x


def invert(model: TextToImage, predict: Predict, x0: Tensor, timesteps: list[int], iterations: int) -> Tensor:
    """The noise that DDIM, run backwards, finds for a picture."""
    abar, x_s = levels(model, timesteps), x0
    for step in reversed(range(len(timesteps))):
        a_t, a_s = abar[step], abar[step + 1]
        x = x_s
        for _ in range(iterations):
            with torch.no_grad():
                eps = predict(x, timesteps[step])
            x = math.sqrt(a_t / a_s) * x_s + (math.sqrt(1 - a_t) - math.sqrt(a_t * (1 - a_s) / a_s)) * eps
        x_s = x
    return x_s


def norm(x: Tensor) -> float:
    return math.hypot(*x.flatten().tolist())


def nearest_in_ball(point: Tensor, z: Tensor, radius: float) -> Tensor:
    """The nearest point of the ball of radius ``radius`` times the norm of z around z."""
    distance = norm(point - z)
    return point if distance <= radius * norm(z) else z + (point - z) * (radius * norm(z) / distance)


def nearest_in_cap(point: Tensor, z: Tensor, radius: float) -> Tensor:
    """The nearest point of the ball that has the norm of z."""
    scaled = point * (norm(z) / norm(point))
    if norm(scaled - z) <= radius * norm(z):
        return scaled
    # On the rim: two sides of length |z|, a chord of radius |z| between them (law of cosines).
    cosine = 1 - radius**2 / 2
    across = point - z * ((point * z).sum() / (z * z).sum())
    return cosine * z + math.sqrt(1 - cosine**2) * norm(z) / norm(across) * across


def attack(
    model: TextToImage,
    predict: Predict,
    x0: Tensor,
    z: Tensor,
    *,
    timesteps: list[int],
    radius: float,
    step_size: float,
    on_sphere: bool,
    checks: int,
    steps: int,
) -> Iterator[tuple[Tensor, float]]:
    """After each check's steps: the noise, and the mean over these of the mean squared difference from x0."""
    project = nearest_in_cap if on_sphere else nearest_in_ball
    noise = z
    for _ in range(checks):
        losses = []
        for _ in range(steps):
            variable = noise.clone().requires_grad_()
            distance = ((sample(model, predict, variable, timesteps) - x0) ** 2).sum()
            distance.backward()
            losses.append(distance.item() / x0.numel())
            direction = variable.grad / norm(variable.grad)
            noise = project(noise - step_size * radius * norm(z) * direction, z, radius)
        yield noise, sum(losses) / len(losses)
