"""SAFREE from its formulas: one prompt, one token, one frequency after the other; projectors by Gram-Schmidt."""

import cmath
import math
from collections.abc import Callable

import torch
from torch import Tensor

Encode = Callable[[list[int]], Tensor]
"""Token ids to text embeddings float64 [tokens, width]."""


def orthonormal(vectors: list[Tensor]) -> list[Tensor]:
    """Gram-Schmidt, twice for precision; what depends on those before is left out."""
    basis: list[Tensor] = []
    for vector in vectors:
        rest = vector.clone()
        for _ in range(2):
            for direction in basis:
                rest = rest - torch.dot(direction, rest) * direction
        if rest.norm() > 1e-9 * vector.norm():
            basis.append(rest / rest.norm())
    return basis


def onto(vectors: list[Tensor], x: Tensor) -> Tensor:
    """The projection of x on the span of ``vectors``."""
    total = torch.zeros_like(x)
    for direction in orthonormal(vectors):
        total = total + torch.dot(direction, x) * direction
    return total


def pooled(encode: Encode, ids: list[int], end: int) -> Tensor:
    """The embedding at the first end token."""
    return encode(ids)[ids.index(end)]


def masked(encode: Encode, ids: list[int], end: int) -> list[Tensor]:
    """m_i for every token between start and end."""
    rows = []
    for place in range(1, ids.index(end)):
        without = list(ids)
        without[place] = 0
        rows.append(encode(without)[ids.index(end)])
    return rows


def triggers(rows: list[Tensor], concept: list[Tensor], alpha: float) -> list[bool]:
    """Whether each token is one."""
    distances = [float((row - onto(concept, row)).norm()) for row in rows]
    found = []
    for place, distance in enumerate(distances):
        others = distances[:place] + distances[place + 1 :]
        found.append(not others or distance >= (1 + alpha) * sum(others) / len(others))
    return found


def projected(e: Tensor, rows: list[Tensor], concept: list[Tensor], order: str) -> Tensor:
    """What a trigger's embedding becomes."""
    if order == "prompt_last":
        return onto(rows, e - onto(concept, e))
    inside = onto(rows, e)
    return inside - onto(concept, inside)


def cosine(a: Tensor, b: Tensor) -> float:
    if a.norm() == 0 or b.norm() == 0:
        return 0.0
    return float(torch.dot(a, b) / (a.norm() * b.norm()))


def filtered(encode: Encode, ids: list[int], end: int, concept: list[Tensor], alpha: float, order: str) -> Tensor:
    """The text with its triggers replaced."""
    text, rows = encode(ids), masked(encode, ids, end)
    result = text.clone()
    for place, found in enumerate(triggers(rows, concept, alpha)):
        if found:
            result[place + 1] = projected(text[place + 1], rows, concept, order)
    return result


def last_step(
    encode: Encode, ids: list[int], end: int, concept: list[Tensor], order: str, gamma: int, k: float, t_0: float
) -> int:
    """The last sampler step that is given the filtered text."""
    text, rows = encode(ids), masked(encode, ids, end)
    active = range(ids.index(end) + 1)
    similarity = [cosine(text[place], projected(text[place], rows, concept, order)) for place in active]
    beta = 1 - sum(similarity) / len(similarity)
    return round(gamma / (1 + math.exp(-2 * k * (10 * beta - t_0))))


def transform(x: list[list[complex]], sign: int) -> list[list[complex]]:
    """The discrete Fourier transform of a matrix, sum by sum."""
    height, width = len(x), len(x[0])
    return [
        [
            sum(
                x[row][column] * cmath.exp(sign * 2j * math.pi * (u * row / height + v * column / width))
                for row in range(height)
                for column in range(width)
            )
            for v in range(width)
        ]
        for u in range(height)
    ]


def attenuated(channel: Tensor, original: Tensor, scale: float) -> Tensor:
    """One channel of the filtered prompt's skip connection beside the original's; frequencies -1 and 0 are low."""
    spectrum, reference = transform(channel.tolist(), -1), transform(original.tolist(), -1)
    for u in (-1, 0):
        for v in (-1, 0):
            if spectrum[u][v].real > reference[u][v].real:
                spectrum[u][v] *= scale
    back = transform(spectrum, 1)
    size = len(spectrum) * len(spectrum[0])
    return torch.tensor([[number.real / size for number in row] for row in back], dtype=torch.float64)
