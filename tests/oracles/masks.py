"""Masks from their formulas, one number at a time."""

import math


def sigmoid(x: float) -> float:
    """The logistic function."""
    return 1 / (1 + math.exp(-x))


def hard_concrete(log_alpha: float, u: float) -> float:
    """A hard-concrete gate (beta 2/3, gamma -0.1, zeta 1.1) from a uniform number."""
    s = sigmoid((math.log(u) - math.log(1 - u) + log_alpha) / (2 / 3))
    return min(1.0, max(0.0, s * (1.1 - -0.1) + -0.1))


def hard_concrete_open(log_alpha: float) -> float:
    """Probability that the gate is not zero."""
    return sigmoid(log_alpha - (2 / 3) * math.log(0.1 / 1.1))


def kept_within_budget(scores: list[float], budget: float) -> list[bool]:
    """1[score > 0], but of those at most a fraction ``budget`` pruned: the lowest scores, then the lowest indices."""
    candidates = [index for index, score in enumerate(scores) if score <= 0]
    pruned = sorted(candidates, key=lambda index: (scores[index], index))[: int(budget * len(scores))]
    return [index not in pruned for index in range(len(scores))]
