"""MACE from its formulas: one matrix, token pair, layer, pixel and concept at a time."""

import math

import torch
from torch import Tensor, nn

from tests.oracles import fmn

Pair = tuple[Tensor, Tensor]
"""An embedding float64 [width] and the one whose keys and values it is to get."""


def positions_around(tokenizer, before: str, phrase: str, after: str, length: int) -> tuple[list[int], list[int]]:
    """Where the phrase's tokens are in a prompt of ``length`` positions, and where all others are, padding included."""
    first, own, last = (len(tokenizer(text, add_special_tokens=False).input_ids) for text in (before, phrase, after))
    start = 1 + first
    assert start + own + last + 1 <= length
    inside = list(range(start, start + own))
    return inside, [place for place in range(length) if place not in inside]


def pairs_around(target: Tensor, around: list[int], anchor: Tensor, wanted: list[int]) -> list[Pair]:
    """The n-th token around the target goes to the n-th around the anchor, as long as both have one."""
    pairs = []
    for place in range(len(around)):
        if place < len(wanted):
            pairs.append((target[around[place]], anchor[wanted[place]]))
    return pairs


def refined(weight: Tensor, pairs: list[Pair], kept: list[tuple[float, Tensor]], ridge: float) -> Tensor:
    """(lambda W + sum W g e^T + sum s W p p^T) (lambda I + sum e e^T + sum s p p^T)^-1."""
    numerator = ridge * weight.clone()
    denominator = ridge * torch.eye(weight.shape[1], dtype=torch.float64)
    for source, destination in pairs:
        numerator += torch.outer(weight @ destination, source)
        denominator += torch.outer(source, source)
    for scale, embedding in kept:
        numerator += scale * torch.outer(weight @ embedding, embedding)
        denominator += scale * torch.outer(embedding, embedding)
    return numerator @ torch.linalg.inv(denominator)


def fused(
    weight: Tensor,
    concepts: list[tuple[Tensor, Tensor, list[Tensor]]],
    kept: list[tuple[float, Tensor]],
    preserving: Tensor,
    ridge: float,
) -> Tensor:
    """The W'' nearest to sending every e of concept i to (W' + B_i A_i) e and every p to where ``preserving`` does."""
    numerator = ridge * weight.clone()
    denominator = ridge * torch.eye(weight.shape[1], dtype=torch.float64)
    for B, A, embeddings in concepts:
        for embedding in embeddings:
            numerator += torch.outer(weight @ embedding + B @ (A @ embedding), embedding)
            denominator += torch.outer(embedding, embedding)
    for scale, embedding in kept:
        numerator += scale * torch.outer(preserving @ embedding, embedding)
        denominator += scale * torch.outer(embedding, embedding)
    return numerator @ torch.linalg.inv(denominator)


def chance(t: int, first: float, second: float, sharpness: float) -> float:
    """How likely timestep t is, relative to the others."""
    rise, fall = (1 / (1 + math.exp(-sharpness * (t - edge))) for edge in (first, second))
    return rise - fall


def at_nearest(mask: list[list[bool]], size: tuple[int, int]) -> list[bool]:
    """A mask in another size, row by row."""
    height, width = len(mask), len(mask[0])
    return [
        mask[row * height // size[0]][column * width // size[1]] for row in range(size[0]) for column in range(size[1])
    ]


def loss(unet: nn.Module, rows: list[tuple[Tensor, int, Tensor, list[int], list[list[bool]] | None]]) -> float:
    """Mean over rows (x_t, t, text, concept tokens, mask) of the sum over layers of the norm of what is looked at."""
    total = 0.0
    for x_t, t, text, tokens, mask in rows:
        for layer, pixels in fmn.seen_by_layers(unet, x_t, t, text):
            edge = math.isqrt(len(pixels))
            inside = [True] * len(pixels) if mask is None else at_nearest(mask, (edge, edge))
            square = 0.0
            for head in fmn.probabilities(layer, pixels, text):
                for pixel, row in enumerate(head):
                    if inside[pixel]:
                        square += sum(row[token] ** 2 for token in tokens)
            total += math.sqrt(square)
    return total / len(rows)
