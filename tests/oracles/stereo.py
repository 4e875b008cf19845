"""STEREO from its formulas: one sample at a time, guidance on lists of numbers, torch's own AdamW."""

import math

import torch
from torch import Tensor, nn

from diffusion.model import TextToImage
from diffusion.streams import stream
from tests.oracles.embedding import denoising_loss
from tests.oracles.p4d import encode
from tests.oracles.textual_inversion import template_with


def pull(prediction: Tensor, empty: Tensor, largest_norm: float | None, parallel: float) -> Tensor:
    """e(p) - e(0), shortened, its part along e(p) weighted; float64 [1, c, h, w]."""
    towards = prediction.flatten().tolist()
    difference = [a - b for a, b in zip(towards, empty.flatten().tolist(), strict=True)]
    norm = math.sqrt(sum(value**2 for value in difference))
    if largest_norm is not None and norm > largest_norm:
        difference = [value * largest_norm / norm for value in difference]
    length = math.sqrt(sum(value**2 for value in towards))
    shared = sum(a * b for a, b in zip(difference, towards, strict=True)) / length
    result = []
    for value, other in zip(difference, towards, strict=True):
        along = shared * other / length
        result.append((value - along) + parallel * along)
    return torch.tensor(result, dtype=prediction.dtype).reshape(prediction.shape)


def target(
    teacher: nn.Module,
    x: Tensor,
    t: int,
    empty: Tensor,
    negatives: list[tuple[float, Tensor]],
    anchors: list[tuple[float, Tensor]],
    *,
    largest_norm: float | None,
    parallel: float,
) -> Tensor:
    """e(0) - sum of scale * u(negative) + sum of scale * u(anchor), float64 [1, c, h, w]; texts are [tokens, width]."""

    def predict(text: Tensor) -> Tensor:
        return teacher(x, torch.tensor([t]), text[None]).sample

    unnamed = predict(empty)
    total = unnamed.clone()
    for scale, text in negatives:
        total = total - scale * pull(predict(text), unnamed, largest_norm, parallel)
    for scale, text in anchors:
        total = total + scale * pull(predict(text), unnamed, largest_norm, parallel)
    return total


def invert(
    model: TextToImage,
    pictures: list[tuple[Tensor, str]],
    start: Tensor,
    *,
    seed: int,
    steps: int,
    size: int,
    rate: float,
    decay: float,
) -> Tensor:
    """v* after training on pictures (latents [c, h, w], caption with {}); start is [width]."""
    v = torch.nn.Parameter(start.clone()[None])
    optimizer = torch.optim.AdamW([v], lr=rate, weight_decay=decay)
    for step in range(steps):
        generator = stream(seed, "stereo/inversion", step)
        picks = torch.randint(len(pictures), (size,), generator=generator).tolist()
        timesteps = torch.randint(1000, (size,), generator=generator).tolist()
        noises = torch.randn((size, *model.latent_shape), generator=generator).to(start.dtype)
        loss = 0
        for pick, t, noise in zip(picks, timesteps, noises, strict=True):
            latents, caption = pictures[pick]
            text = encode(model, template_with(model, caption, v))
            loss = loss + denoising_loss(model, text, latents, noise, t) / size
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return v.detach()
