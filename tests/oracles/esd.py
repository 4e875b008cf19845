"""ESD from its formula: one sample at a time, one U-Net call per prediction, DDIM written out."""

import torch
from torch import Tensor, nn


def trajectory_point(
    unet: nn.Module,
    alphas: list[float],
    timesteps: list[int],
    stop: int,
    seed: int,
    shape: tuple[int, int, int],
    text: Tensor,
    empty: Tensor,
    guidance: float,
) -> Tensor:
    """x_t before step ``stop`` of a guided DDIM trajectory, float64 [1, c, h, w]."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.float64)[None]
    for step in range(stop):
        t, next_t = timesteps[step], timesteps[step + 1]
        e_0 = unet(x, torch.tensor([t]), empty[None]).sample
        e_c = unet(x, torch.tensor([t]), text[None]).sample
        e = (1 - guidance) * e_0 + guidance * e_c
        x_0 = (x - (1 - alphas[t]) ** 0.5 * e) / alphas[t] ** 0.5
        x = alphas[next_t] ** 0.5 * x_0 + (1 - alphas[next_t]) ** 0.5 * e
    return x


def target(frozen: nn.Module, x: Tensor, t: int, text: Tensor, reference: Tensor, eta: float) -> Tensor:
    """eps*(x_t, r, t) - eta (eps*(x_t, c, t) - eps*(x_t, r, t)), float64 [1, c, h, w]; r is the empty prompt's text."""
    e_r = frozen(x, torch.tensor([t]), reference[None]).sample
    e_c = frozen(x, torch.tensor([t]), text[None]).sample
    return e_r - eta * (e_c - e_r)


def mean_squared_error(unet: nn.Module, points: list[tuple[Tensor, int, Tensor, Tensor]]) -> float:
    """Mean over (x_t, t, text, target) and over their elements."""
    total, count = 0.0, 0
    for x, t, text, wanted in points:
        prediction = unet(x, torch.tensor([t]), text[None]).sample
        for a, b in zip(prediction.flatten().tolist(), wanted.flatten().tolist(), strict=True):
            total += (a - b) ** 2
            count += 1
    return total / count


def attribute_target(
    frozen: nn.Module, x: Tensor, t: int, whole: Tensor, attribute: Tensor, reference: Tensor, eta: float
) -> Tensor:
    """eps*(x_t, f, t) - eta (eps*(x_t, c, t) - eps*(x_t, r, t)), float64 [1, c, h, w]; f is what c is erased from."""
    e_f, e_c, e_r = (frozen(x, torch.tensor([t]), text[None]).sample for text in (whole, attribute, reference))
    return e_f - eta * (e_c - e_r)


def published_point(
    unet: nn.Module,
    alphas: list[float],
    ascending: list[int],
    till: int,
    seed: int,
    shape: tuple[int, int, int],
    text: Tensor,
    empty: Tensor,
    guidance: float,
) -> Tensor:
    """The CompVis code's latents: the list lacks its noisiest timestep, and the loop ends after index + 1 == till.

    ``ascending`` are all sampler timesteps; ``till`` is the number drawn, 0 for the least noisy.
    """
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.float64)[None]
    used = ascending[:-1]
    for index in reversed(range(len(used))):
        t = used[index]
        before = alphas[used[index - 1]] if index > 0 else alphas[0]
        e_0 = unet(x, torch.tensor([t]), empty[None]).sample
        e_c = unet(x, torch.tensor([t]), text[None]).sample
        e = e_0 + guidance * (e_c - e_0)
        x_0 = (x - (1 - alphas[t]) ** 0.5 * e) / alphas[t] ** 0.5
        x = before**0.5 * x_0 + (1 - before) ** 0.5 * e
        if index + 1 == till:
            break
    return x
