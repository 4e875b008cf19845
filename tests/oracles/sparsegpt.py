"""SparseGPT from its formula: a new inverse Hessian for every column, saliencies ranked in lists, row by row."""

import math
from fractions import Fraction

import torch
from torch import Tensor


def lowest(saliencies: list[tuple[float, int]], fraction: str) -> list[int]:
    """The places of the lowest ``fraction`` (a decimal) of (saliency, place); of those that tie the first."""
    return [place for _, place in sorted(saliencies)[: math.floor(Fraction(fraction) * len(saliencies))]]


def pruned(weight: Tensor, products: Tensor, fraction: str, per: str | int, block: int, damping: float) -> Tensor:
    """The pruned matrix, float64 [outputs, inputs]; ``products`` is 2 X X^T / n."""
    rows, columns = weight.shape
    damped = products + damping * sum(products.diagonal().tolist()) / columns * torch.eye(columns, dtype=torch.float64)
    inverses = [torch.linalg.inv(damped[c:, c:]) for c in range(columns)]
    w = [row.tolist() for row in weight]
    gone: set[tuple[int, int]] = set()
    for c in range(columns):
        together = per if isinstance(per, int) else block
        if c % together == 0:
            some = range(c, min(c + together, columns))
            saliency = {(r, k): w[r][k] ** 2 / float(inverses[k][0, 0]) for r in range(rows) for k in some}
            groups = [[(r, k) for r in range(rows) for k in some]]
            if per != "layer":
                groups = [[(r, k) for k in some] for r in range(rows)]
            for group in groups:
                ranked = [(saliency[place], number) for number, place in enumerate(group)]
                gone |= {group[number] for number in lowest(ranked, fraction)}
        first = inverses[c][0].tolist()
        for r in range(rows):
            if (r, c) in gone:
                error = w[r][c] / first[0]
                for j in range(c + 1, columns):
                    w[r][j] -= error * first[j - c]
                w[r][c] = 0.0
    return torch.tensor(w, dtype=torch.float64)


def inputs_of_kernel(picture: Tensor, size: int, stride: int) -> list[list[float]]:
    """What a kernel with half its size as padding meets at each position of [channels, h, w]: taps, then channels."""
    channels, height, width = picture.shape
    met = []
    for top in range(0, height, stride):
        for left in range(0, width, stride):
            column = []
            for y in range(top - size // 2, top - size // 2 + size):
                for x in range(left - size // 2, left - size // 2 + size):
                    inside = 0 <= y < height and 0 <= x < width
                    column += [float(picture[c, y, x]) if inside else 0.0 for c in range(channels)]
            met.append(column)
    return met
