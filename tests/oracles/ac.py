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


def noise_loss(unet: nn.Module, alphas: list[float], rows: list[tuple[Tensor, Tensor, int, Tensor]]) -> float:
    """Mean of (eps(x_t, c, t) - noise)^2 over rows (x_0, noise, t, c): the noise-based variant, and the prior."""
    total, count = 0.0, 0
    for x_0, noise, t, text in rows:
        x_t = (alphas[t] ** 0.5 * x_0 + (1 - alphas[t]) ** 0.5 * noise)[None]
        ours = unet(x_t, torch.tensor([t]), text[None]).sample
        for a, b in zip(ours.flatten().tolist(), noise.flatten().tolist(), strict=True):
            total += (a - b) ** 2
            count += 1
    return total / count


def attention(
    hidden: Tensor, text: Tensor, query: Tensor, key: Tensor, value: Tensor, heads: int, *, cut: bool
) -> Tensor:
    """Cross-attention before its output projection, token by token; hidden float64 [pixels, c], text [tokens, width].

    With ``cut`` the first token's key and value are constants.
    """
    size = len(query) // heads
    outputs = []
    for pixel in hidden:
        per_head = []
        for head in range(heads):
            rows = slice(head * size, (head + 1) * size)
            keys, values = [], []
            for place, token in enumerate(text):
                k, v = key[rows] @ token, value[rows] @ token
                keys.append(k.detach() if cut and place == 0 else k)
                values.append(v.detach() if cut and place == 0 else v)
            scores = torch.stack([torch.dot(query[rows] @ pixel, k) / size**0.5 for k in keys])
            weights = scores.exp() / scores.exp().sum()
            per_head.append(sum(weight * v for weight, v in zip(weights, values, strict=True)))
        outputs.append(torch.cat(per_head))
    return torch.stack(outputs)
