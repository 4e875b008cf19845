"""Mask revival on one matrix, from its formulas: lists and loops around numpy's singular values."""

import math
from fractions import Fraction

import numpy as np

Matrix = list[list[float]]


def low_rank(rows: Matrix) -> Matrix:
    """The matrix with every singular value lowered by the smallest."""
    left, values, right = np.linalg.svd(np.array(rows))
    smallest = min(values)
    return [
        [
            sum(left[i, k] * max(value - smallest, 0) * right[k, j] for k, value in enumerate(values))
            for j in range(len(rows[0]))
        ]
        for i in range(len(rows))
    ]


def distance(one: Matrix, other: Matrix) -> float:
    """Frobenius norm of the difference."""
    return math.sqrt(sum((a - b) ** 2 for p, q in zip(one, other, strict=True) for a, b in zip(p, q, strict=True)))


def complete(matrix: Matrix, tolerance: float, iterations: int, lag: int) -> tuple[Matrix, int]:
    """The completed matrix, in which empty rows and columns are zero, and how many iterations it took."""
    rows = [i for i, row in enumerate(matrix) if any(row)]
    columns = [j for j in range(len(matrix[0])) if any(row[j] for row in matrix)]
    known = [[matrix[i][j] for j in columns] for i in rows]
    means = []
    for place in range(len(columns)):
        left = [row[place] for row in known if row[place]]
        means.append(sum(left) / len(left))
    history = [[[value or mean for value, mean in zip(row, means, strict=True)] for row in known]]
    for count in range(1, iterations + 1):
        lower = low_rank(history[-1])
        history.append([[a or b for a, b in zip(p, q, strict=True)] for p, q in zip(known, lower, strict=True)])
        if count >= lag:
            before = history[-1 - lag]
            zero = [[0.0] * len(row) for row in before]
            if distance(history[-1], before) / distance(before, zero) < tolerance:
                break
    completed = [[0.0] * len(matrix[0]) for _ in matrix]
    for i, row in zip(rows, history[-1], strict=True):
        for j, value in zip(columns, row, strict=True):
            completed[i][j] = value
    return completed, len(history) - 1


def fill(matrix: Matrix, completed: Matrix, top_ratio: str, magnitude: str) -> Matrix:
    """The matrix with those of its zeros filled whose completed values are largest; ``top_ratio`` is a decimal."""
    zeros = [
        (abs(value), i, j)
        for i, row in enumerate(completed)
        for j, value in enumerate(row)
        if matrix[i][j] == 0 and value != 0
    ]
    dropped = math.floor((1 - Fraction(top_ratio)) * len(zeros))
    filled = [list(row) for row in matrix]
    for size, i, j in sorted(zeros)[dropped:]:
        left = [abs(value) for value in matrix[i] if value]
        wanted = {"max": max(left) * (1 + 1e-6), "mean": sum(left) / len(left), "completed": size}[magnitude]
        filled[i][j] = math.copysign(wanted, completed[i][j])
    return filled
