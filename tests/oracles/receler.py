"""Receler from its formulas: one sample at a time, masks and sums on lists, Adam on single numbers."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tests.oracles import attention, fmn
from tests.oracles.unlearndiff import Adam

Mask = list[list[bool]]


def gelu(x: float) -> float:
    """x times the chance that a unit Gaussian number is below x."""
    return x * (1 + math.erf(x / math.sqrt(2))) / 2


def added(
    pixel: list[float], down: list[list[float]], down_bias: list[float], up: list[list[float]], up_bias: list[float]
) -> list[float]:
    """U GELU(D h + a) + b for one pixel's h."""
    hidden = [
        gelu(sum(d * h for d, h in zip(row, pixel, strict=True)) + a) for row, a in zip(down, down_bias, strict=True)
    ]
    return [sum(u * g for u, g in zip(row, hidden, strict=True)) + b for row, b in zip(up, up_bias, strict=True)]


def predict(
    unet: nn.Module, weights: dict[str, Tensor], x: Tensor, t: int, text: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """eps(x, text, t) with adapters, [1, c, h, w], and what each adds, [pixels, width], in the order of the layers."""
    outputs: list[Tensor] = []

    def adapt(name: str):
        down, down_bias, up, up_bias = (
            weights[f"{name}.{part}"] for part in ("down.weight", "down.bias", "up.weight", "up.bias")
        )

        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
            hidden = output @ down.T + down_bias
            outputs.append((hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2 @ up.T + up_bias)[0])
            return output + outputs[-1]

        return hook

    hooks = [layer.register_forward_hook(adapt(name)) for name, layer in unet.named_modules() if name.endswith("attn2")]
    try:
        return unet(x, torch.tensor([t]), text[None]).sample, outputs
    finally:
        for hook in hooks:
            hook.remove()


def concept_mask(
    frozen: nn.Module, x: Tensor, t: int, text: Tensor, tokens: list[int], size: tuple[int, int], threshold: float
) -> Mask:
    """Where the frozen model looks at the concept's tokens, in the layers of one size."""
    layers = [
        fmn.probabilities(layer, pixels, text)
        for layer, pixels in fmn.seen_by_layers(frozen, x[0], t, text)
        if len(pixels) == size[0] * size[1]
    ]
    return [[value >= threshold for value in row] for row in attention.stretched_map(layers, tokens, size)]


def resized(mask: Mask, height: int, width: int) -> Mask:
    """The mask in another size, every pixel that of the nearest one above and to the left."""
    return [
        [mask[row * len(mask) // height][column * len(mask[0]) // width] for column in range(width)]
        for row in range(height)
    ]


def regularisation(outputs: list[Tensor], mask: Mask) -> Tensor:
    """Mean over layers of the mean square of what is added to the pixels outside the mask; square latents."""
    total = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        edge = math.isqrt(len(output))
        inside = [value for row in resized(mask, edge, edge) for value in row]
        squares = [(row**2).sum() / len(row) for row, value in zip(output, inside, strict=True) if not value]
        if squares:
            total = total + sum(squares) / len(squares)
    return total / len(outputs)


@dataclass
class Prompt:
    """A target prompt's adversarial embeddings, [k, width], which stand behind its ``length`` tokens."""

    text: Tensor
    length: int
    rows: list[list[float]]
    rate: float
    decay: float
    adams: list[list[Adam]] = field(init=False)

    def __post_init__(self) -> None:
        self.adams = [[Adam(self.rate, self.decay) for _ in row] for row in self.rows]

    def attacked(self) -> Tensor:
        """The prompt's embedding with the adversarial ones in it, [tokens, width]."""
        rows = list(self.text)
        for place, row in enumerate(self.rows):
            rows[1 + self.length + place] = torch.tensor(row, dtype=self.text.dtype)
        return torch.stack(rows)

    def gradient(
        self, unet: nn.Module, weights: dict[str, Tensor], x: Tensor, t: int, wanted: Tensor
    ) -> list[list[float]]:
        """Of the mean of (eps(x, [c, e], t) - wanted)^2, by the embeddings."""
        text = self.attacked().requires_grad_()
        with torch.enable_grad():
            noise, _ = predict(unet, weights, x, t, text)
            (slope,) = torch.autograd.grad(((noise - wanted) ** 2).sum() / wanted.numel(), text)
        return slope[1 + self.length : 1 + self.length + len(self.rows)].tolist()

    def step(self, slopes: list[list[float]]) -> None:
        """One step of Adam."""
        self.rows = [
            [adam.step(value, slope) for adam, value, slope in zip(*column, strict=True)]
            for column in zip(self.adams, self.rows, slopes, strict=True)
        ]
