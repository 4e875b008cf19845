"""Concept ablation from its formula, one sample at a time."""

import torch
from torch import Tensor, nn


def loss(unet: nn.Module, alphas: list[float], rows: list[tuple[Tensor, Tensor, int, Tensor, Tensor]]) -> float:
    """Mean of (eps(x_t, c*, t) - eps(x_t, c, t))^2 over rows (x_0, noise, t, c*, c)."""
    total, count = 0.0, 0
    for x_0, noise, t, target, anchor in rows:
        x_t = (alphas[t] ** 0.5 * x_0 + (1 - alphas[t]) ** 0.5 * noise)[None]
        ours = unet(x_t, torch.tensor([t]), target[None]).sample
        theirs = unet(x_t, torch.tensor([t]), anchor[None]).sample
        for a, b in zip(ours.flatten().tolist(), theirs.flatten().tolist(), strict=True):
            total += (a - b) ** 2
            count += 1
    return total / count
