"""Relearning from its formulas: a loss picture by picture, and AdamW written out."""

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from diffusion.streams import stream


def train(
    unet: nn.Module,
    alphas: list[float],
    pictures: list[Tensor],
    texts: list[Tensor],
    *,
    trained: list[str],
    zeros_stay: bool,
    steps: int,
    size: int,
    rate: float,
    decay: float,
    seed: int,
) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """After each step: its loss and the trained weights. Pictures are latents [c, h, w], texts [tokens, width]."""
    unet = copy.deepcopy(unet)
    weights = dict(unet.named_parameters())
    gone = {name: weights[name].detach() == 0 for name in trained}
    first = {name: torch.zeros_like(weights[name]) for name in trained}
    second = {name: torch.zeros_like(weights[name]) for name in trained}
    for name in trained:
        weights[name].requires_grad_()
    for step in range(steps):
        generator = stream(seed, "relearn/training", step)
        picks = torch.randint(len(pictures), (size,), generator=generator).tolist()
        times = torch.randint(len(alphas), (size,), generator=generator).tolist()
        noises = torch.randn((size, *pictures[0].shape), generator=generator).double()
        losses = []
        for pick, time, noise in zip(picks, times, noises, strict=True):
            noisy = math.sqrt(alphas[time]) * pictures[pick] + math.sqrt(1 - alphas[time]) * noise
            predicted = unet(noisy[None], torch.tensor([time]), texts[pick][None]).sample[0]
            losses.append(((noise - predicted) ** 2).sum() / noise.numel())
        loss = sum(losses) / size
        unet.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name in trained:
                weight, gradient = weights[name], weights[name].grad
                gradient = torch.zeros_like(weight) if gradient is None else gradient
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.999 * second[name] + 0.001 * gradient**2
                mean = first[name] / (1 - 0.9 ** (step + 1))
                variance = second[name] / (1 - 0.999 ** (step + 1))
                changed = weight - rate * decay * weight - rate * mean / (variance.sqrt() + 1e-8)
                if zeros_stay and weight.ndim > 1:
                    changed[gone[name]] = 0
                weight.copy_(changed)
        yield loss.item(), {name: weights[name].detach().clone() for name in trained}
