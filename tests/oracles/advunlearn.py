"""AdvUnlearn from its formulas: one sample at a time, the attack on lists of numbers, Adam written out."""

import torch
from torch import Tensor

from diffusion.model import TextToImage
from tests.oracles.p4d import encode
from tests.oracles.unlearndiff import Adam, insert, prompt_tokens


def adversarial_text(model: TextToImage, prompt: str, rows: list[Tensor], where: str) -> Tensor:
    """Text embeddings, [1, tokens, width], of the prompt with embeddings [width] among its tokens."""
    return encode(model, insert(prompt_tokens(model, prompt, len(rows)), rows, where))


def squared_error(model: TextToImage, x: Tensor, t: int, text: Tensor, wanted: Tensor) -> Tensor:
    """Mean over the elements of (eps(x, text, t) - wanted)^2; x and wanted [1, c, h, w]."""
    predicted = model.network(x, torch.tensor([t]), text).sample
    return ((predicted - wanted) ** 2).sum() / wanted.numel()


def attack(
    model: TextToImage,
    prompt: str,
    start: Tensor,
    points: list[tuple[Tensor, int, Tensor]],
    *,
    where: str,
    rate: float,
    signs: bool,
    accumulate: bool,
) -> list[Tensor]:
    """The embeddings after a step of Adam at every point (x, t, eps*(x, c)); start is [k, width]."""
    numbers = start.tolist()
    adams = [[Adam(rate, 0.0) for _ in row] for row in numbers]
    held = torch.zeros_like(start)
    for x, t, wanted in points:
        rows = [torch.tensor(row, dtype=start.dtype, requires_grad=True) for row in numbers]
        with torch.enable_grad():
            squared_error(model, x, t, adversarial_text(model, prompt, rows, where), wanted).backward()
        gradient = torch.stack([torch.zeros_like(row) if row.grad is None else row.grad for row in rows])
        held = held + gradient if accumulate else gradient
        if signs:
            held = torch.tensor([[float((value > 0) - (value < 0)) for value in row] for row in held.tolist()]).to(held)
        for row, states, changes in zip(numbers, adams, held.tolist(), strict=True):
            for place, (state, change) in enumerate(zip(states, changes, strict=True)):
                row[place] = state.step(row[place], change)
    return [torch.tensor(row, dtype=start.dtype) for row in numbers]
