"""PEZ on one prompt, step by step, from the formulas: lists, loops over the vocabulary, torch's own AdamW."""

import math
from collections.abc import Iterator

import torch

from diffusion.model import TextToImage
from tests.oracles.p4d import encode, nearest
from tests.oracles.unlearndiff import insert, prompt_tokens


def attack(
    model: TextToImage,
    prompt: str,
    x0: torch.Tensor,
    generator: torch.Generator,
    *,
    count: int,
    where: str,
    timesteps: list[int | None],
    steps: int,
    rate: float,
    decay: float,
) -> Iterator[tuple[str, float]]:
    """After each timestep, None to draw one for each step: the text and the mean loss."""
    vocabulary = model.vocabulary
    allowed = [token for token in range(len(vocabulary)) if token not in model.tokenizer.all_special_ids]
    own = prompt_tokens(model, prompt, count)
    start = [allowed[index] for index in torch.randint(len(allowed), (count,), generator=generator).tolist()]
    e = torch.nn.Parameter(torch.stack([vocabulary[token] for token in start]).clone())
    optimizer = torch.optim.AdamW([e], lr=rate, weight_decay=decay)
    for timestep in timesteps:
        drawn = [timestep] * steps
        if timestep is None:
            drawn = torch.randint(1000, (steps,), generator=generator).tolist()
        noises = torch.randn((steps, *model.latent_shape), generator=generator).double()
        losses = []
        for t, noise in zip(drawn, noises, strict=True):
            abar = float(model.process.alphas[t])
            x_t = math.sqrt(abar) * x0 + math.sqrt(1 - abar) * noise
            free = [vocabulary[nearest(row, vocabulary, allowed)].clone().requires_grad_() for row in e.detach()]
            predicted = model.predict(x_t[None], t, encode(model, insert(own, free, where)))[0]
            loss = ((predicted - noise) ** 2).sum() / noise.numel()
            loss.backward()
            e.grad = torch.stack([row.grad for row in free])
            optimizer.step()
            losses.append(loss.item())
        tokens = [nearest(row, vocabulary, allowed) for row in e.detach()]
        yield model.tokenizer.decode(insert(own, tokens, where)).strip(), sum(losses) / len(losses)
