"""Free embeddings in one prompt, step by step, from the formula: lists of rows, loops, torch's own Adam."""

import math
from collections.abc import Iterator

import torch

from diffusion.model import TextToImage
from tests.oracles.p4d import encode
from tests.oracles.unlearndiff import insert, prompt_tokens


def text_with(model: TextToImage, prompt: str, rows: torch.Tensor, where: str) -> torch.Tensor:
    """Text embeddings, [1, tokens, width], of a prompt with embeddings [k, width] inserted."""
    return encode(model, insert(prompt_tokens(model, prompt, len(rows)), list(rows), where))


def denoising_loss(
    model: TextToImage, text: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor, t: int
) -> torch.Tensor:
    """Mean squared error of the predicted noise at x_t = sqrt(abar) x0 + sqrt(1 - abar) noise."""
    abar = float(model.process.alphas[t])
    x_t = math.sqrt(abar) * x0 + math.sqrt(1 - abar) * noise
    return ((model.predict(x_t[None], t, text)[0] - noise) ** 2).sum() / noise.numel()


def attack(
    model: TextToImage,
    prompt: str,
    x0: torch.Tensor,
    generator: torch.Generator,
    start: torch.Tensor,
    *,
    where: str,
    timesteps: list[int],
    steps: int,
    rate: float,
    decay: float,
) -> Iterator[tuple[torch.Tensor, float]]:
    """After each timestep: the text embeddings with what was found, and the mean loss."""
    e = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([e], lr=rate, weight_decay=decay)
    for t in timesteps:
        losses = []
        for _ in range(steps):
            noise = torch.randn(model.latent_shape, generator=generator).double()
            loss = denoising_loss(model, text_with(model, prompt, e, where), x0, noise, t)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        yield text_with(model, prompt, e.detach(), where), sum(losses) / len(losses)
