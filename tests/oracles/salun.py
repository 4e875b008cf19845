"""SalUn from its formulas: one picture at a time, weights ranked one by one."""

import torch
from torch import Tensor, nn

Row = tuple[Tensor, Tensor, int, Tensor, Tensor]


def noised(alphas: list[float], x_0: Tensor, noise: Tensor, t: int) -> Tensor:
    """x_t, float64 [1, c, h, w]."""
    return (alphas[t] ** 0.5 * x_0 + (1 - alphas[t]) ** 0.5 * noise)[None]


def saliency(unet: nn.Module, names: list[str], alphas: list[float], rows: list[Row], guidance: float) -> list[float]:
    """|g| of every weight of ``names`` in order, from rows (x_0, noise, t, c, empty)."""
    parameters = dict(unet.named_parameters())
    weights = [parameters[name].requires_grad_() for name in names]
    sums = [torch.zeros_like(weight) for weight in weights]
    for x_0, noise, t, text, empty in rows:
        x_t = noised(alphas, x_0, noise, t)
        e_c = unet(x_t, torch.tensor([t]), text[None]).sample
        e_0 = unet(x_t, torch.tensor([t]), empty[None]).sample
        error = -((noise - (guidance * e_c - (guidance - 1) * e_0)[0]) ** 2).sum()
        for total, gradient in zip(sums, torch.autograd.grad(error, weights), strict=True):
            total.add_(gradient)
    for weight in weights:
        weight.requires_grad_(False)
    return [abs(value) for total in sums for value in total.flatten().tolist()]


def mask(saliencies: list[float], fraction: float) -> list[bool]:
    """The largest ``int(fraction * n)``; of equal ones the later."""
    order = sorted(range(len(saliencies)), key=lambda index: (saliencies[index], index), reverse=True)
    chosen = set(order[: int(fraction * len(saliencies))])
    return [index in chosen for index in range(len(saliencies))]


def loss(unet: nn.Module, alphas: list[float], forgotten: list[Row], retained: list[Row], alpha: float) -> float:
    """Mean of (e(x_t, c) - e(x_t, c'))^2 over rows (x_0, noise, t, c, c') + alpha mean of (e(y_t, c) - noise)^2."""
    totals = []
    for rows, relabelled in ((forgotten, True), (retained, False)):
        total, count = 0.0, 0
        for x_0, noise, t, text, other in rows:
            x_t = noised(alphas, x_0, noise, t)
            ours = unet(x_t, torch.tensor([t]), text[None]).sample[0]
            wanted = unet(x_t, torch.tensor([t]), other[None]).sample[0] if relabelled else noise
            for a, b in zip(ours.flatten().tolist(), wanted.flatten().tolist(), strict=True):
                total += (a - b) ** 2
                count += 1
        totals.append(total / max(count, 1))
    return totals[0] + alpha * totals[1]
