"""Intervals and tests from their formulas, in plain Python."""

import math
from statistics import NormalDist


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """(p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = successes / n
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


def exact_mcnemar(b: int, c: int) -> float:
    """Sum of binomial(b + c, 1/2) over the outcomes that are at most as likely as the one seen."""
    n = b + c
    weights = [math.comb(n, k) for k in range(n + 1)]
    return sum(weight for weight in weights if weight <= weights[b]) / 2**n


def newcombe_paired(a: int, b: int, c: int, d: int) -> tuple[float, float]:
    """Method 10 of Newcombe (1998) for the table [[a, b], [c, d]]: rates (a + b) / n and (a + c) / n."""
    n = a + b + c + d
    p1, p2 = (a + b) / n, (a + c) / n
    l1, u1 = wilson(a + b, n)
    l2, u2 = wilson(a + c, n)
    product = (a + b) * (c + d) * (a + c) * (b + d)
    determinant = a * d - b * c
    if product == 0:
        phi = 0.0
    elif determinant > n / 2:
        phi = (determinant - n / 2) / math.sqrt(product)
    elif determinant >= 0:
        phi = 0.0
    else:
        phi = determinant / math.sqrt(product)
    low = (p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2
    high = (p2 - l2) ** 2 - 2 * phi * (p2 - l2) * (u1 - p1) + (u1 - p1) ** 2
    return p1 - p2 - math.sqrt(low), p1 - p2 + math.sqrt(high)
