"""Scored pruning from its formulas: one weight at a time, one U-Net call per prediction, everything in float64."""

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import product

import torch
from torch import Tensor, nn

from tests.oracles.esd import trajectory_point

Place = tuple[str, tuple[int, ...]]


def places(shapes: dict[str, tuple[int, ...]]) -> list[Place]:
    """Every weight in order: its parameter and its index."""
    return [(name, index) for name, shape in shapes.items() for index in product(*map(range, shape))]


def pruned(scores: dict[Place, float], fraction: str, per: str | int) -> set[Place]:
    """The lowest ``fraction`` (a decimal) of the weights of each group; of those that tie the first."""
    groups: dict[object, list[Place]] = {}
    for name, index in scores:
        output, channel, *tap = index
        key: object = {"global": 0, "layer": name, "row": (name, output)}.get(per) if isinstance(per, str) else None
        if isinstance(per, int):
            key = (name, output, tuple(tap), channel // per)
        groups.setdefault(key, []).append((name, index))
    gone = set()
    for group in groups.values():
        count = math.floor(Fraction(fraction) * len(group))
        ranked = sorted(range(len(group)), key=lambda number, group=group: (scores[group[number]], number))
        gone |= {group[number] for number in ranked[:count]}
    return gone


def recorded_steps(
    unet: nn.Module,
    layers: list[str],
    alphas: list[float],
    timesteps: list[int],
    steps: int,
    pictures: list[tuple[int, Tensor]],
    empty: Tensor,
    guidance: float,
    shape: tuple[int, int, int],
) -> list[dict[str, list[Tensor]]]:
    """The layers' inputs at each of the first steps, one tensor per picture (seed, text) and half of guidance."""
    records = []
    for step in range(steps):
        record: dict[str, list[Tensor]] = {name: [] for name in layers}
        for seed, text in pictures:
            x = trajectory_point(unet, alphas, timesteps, step, seed, shape, text, empty, guidance)
            hooks = [
                unet.get_submodule(name).register_forward_hook(
                    lambda _, inputs, __, name=name, record=record: record[name].append(inputs[0])
                )
                for name in layers
            ]
            for condition in (empty, text):
                unet(x, torch.tensor([timesteps[step]]), condition[None])
            for hook in hooks:
                hook.remove()
        records.append(record)
    return records


def norm(inputs: list[Tensor], input_index: int, unit_tokens: bool = False) -> float:
    """|| X_j || over the rows of all inputs [1, positions, width] of a linear layer."""
    total = 0.0
    for rows in inputs:
        for row in rows[0].tolist():
            length = math.sqrt(sum(value * value for value in row)) if unit_tokens else 1.0
            total += (row[input_index] / length) ** 2
    return math.sqrt(total)


def kernel_norm(inputs: list[Tensor], channel: int, y: int, x: int, size: int, stride: int) -> float:
    """|| X || of what weight [any, channel, y, x] of a kernel with half its size as padding is multiplied with."""
    total = 0.0
    for picture in inputs:
        rows = picture[0, channel].tolist()
        height, width = len(rows), len(rows[0])
        for top in range(0, height, stride):
            for left in range(0, width, stride):
                row, column = top + y - size // 2, left + x - size // 2
                if 0 <= row < height and 0 <= column < width:
                    total += rows[row][column] ** 2
    return math.sqrt(total)


def skilled(weight: Tensor, targets: list[float], anchors: list[float], fraction: str, name: str) -> set[Place]:
    """Weights of a matrix whose target score is among the highest of their row and above the anchor's score."""
    size = {index: abs(float(weight[index])) for _, index in places({name: tuple(weight.shape)})}
    scores = {(name, index): -size[index] * targets[index[1]] for index in size}
    return {
        (name, index)
        for name, index in pruned(scores, fraction, "row")
        if size[index] * targets[index[1]] > size[index] * anchors[index[1]]
    }


def gradients(losses: Iterator[Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sum of the losses' gradients, one loss at a time."""
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for loss in losses:
        for name, part in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            total[name] = total[name] + part
    return total


def denoising(
    unet: nn.Module, alphas: list[float], t: int, pictures: list[tuple[Tensor, Tensor, Tensor]]
) -> Iterator[Tensor]:
    """|| noise - eps(x_t, c, t) ||^2 (mean) / pictures, of every picture (latents, noise, text)."""
    for latents, noise, text in pictures:
        x_t = (alphas[t] ** 0.5 * latents + (1 - alphas[t]) ** 0.5 * noise)[None]
        error = unet(x_t, torch.tensor([t]), text[None]).sample - noise[None]
        yield error.pow(2).sum() / error.numel() / len(pictures)


def scored(tensors: dict[str, Tensor], score: Callable[[float, float], float], weights: dict[str, Tensor]) -> dict:
    """score(gradient, weight) of every weight."""
    return {
        (name, index): score(float(tensors[name][index]), float(weights[name][index]))
        for name, index in places({name: tuple(weight.shape) for name, weight in weights.items()})
    }
