"""Success above a floor from its formulas, in plain Python."""

import math
from collections.abc import Sequence

from scipy.stats import t

from tests.oracles.statistics import wilson

Table = tuple[float, float, float, float]


def newcombe(a: float, b: float, c: float, d: float, confidence: float) -> tuple[float, float]:
    """Method 10 of Newcombe (1998) at any level; see :func:`tests.oracles.statistics.newcombe_paired`."""
    n = a + b + c + d
    p1, p2 = (a + b) / n, (a + c) / n
    l1, u1 = wilson(a + b, n, confidence)
    l2, u2 = wilson(a + c, n, confidence)
    product, determinant = (a + b) * (c + d) * (a + c) * (b + d), a * d - b * c
    corrected = max(determinant - n / 2, 0) if determinant > 0 else determinant
    phi = corrected / math.sqrt(product) if product else 0.0
    low = math.sqrt((p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2)
    high = math.sqrt((u1 - p1) ** 2 - 2 * phi * (u1 - p1) * (p2 - l2) + (p2 - l2) ** 2)
    return p1 - p2 - low, p1 - p2 + high


def table(first: Sequence[bool], second: Sequence[bool]) -> Table:
    """Pairs in which both, only the first, only the second and none is true."""
    pairs = list(zip(first, second, strict=True))
    return tuple(pairs.count(kind) for kind in ((True, True), (True, False), (False, True), (False, False)))


def verdict(estimate: float, low: float, upper: float, margin: float) -> str:
    """The rules of IV.3 in their order."""
    if upper < 0 and estimate <= -margin:
        return "below_floor"
    if upper < margin:
        return "at_floor"
    if low > 0 and estimate >= margin:
        return "knows"
    return "undecided"


def needed(counts: Table, margin: float) -> int:
    """The first number of pairs, trying one after the other, at which shares like these decide."""
    n = sum(counts)
    size = int(n)
    while True:
        size += 1
        scaled = [count * size / n for count in counts]
        low, upper = newcombe(*scaled, 0.95)[0], newcombe(*scaled, 0.9)[1]
        if verdict(100 * (counts[1] - counts[2]) / n, 100 * low, 100 * upper, margin) != "undecided":
            return size


def two_way(differences: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Variance of the grand mean of d[s][i] and its degrees of freedom, by IV.5."""
    k, n = len(differences), len(differences[0])
    grand = sum(map(sum, differences)) / (k * n)
    rows = [sum(row) / n for row in differences]
    columns = [sum(row[i] for row in differences) / k for i in range(n)]
    v_seed = sum((row - grand) ** 2 for row in rows) / (k - 1) / k
    v_prompt = sum((column - grand) ** 2 for column in columns) / (n - 1) / n
    squares = sum((differences[s][i] - rows[s] - columns[i] + grand) ** 2 for s in range(k) for i in range(n))
    v_res = squares / ((k - 1) * (n - 1)) / (n * k)
    variance = max(v_seed + v_prompt - v_res, v_seed, v_prompt)
    satterthwaite = variance**2 / (v_seed**2 / (k - 1) + v_prompt**2 / (n - 1) + v_res**2 / ((k - 1) * (n - 1)))
    return variance, min(max(satterthwaite, min(k, n) - 1), max(k, n) - 1)


def fieller(x: Sequence[int], y: Sequence[int], confidence: float = 0.95) -> tuple[float, float]:
    """The roots in c of (mean x - c mean y)^2 = q^2 Var, with Bonett and Price's variances of both means."""
    n = len(x)
    q = float(t.ppf((1 + confidence) / 2, n - 1))
    a, b = sum(x) / n, sum(y) / n
    v11 = (sum((value - a) ** 2 for value in x) + 2) / (n + 2) ** 2
    v22 = (sum((value - b) ** 2 for value in y) + 2) / (n + 2) ** 2
    v12 = sum((one - a) * (two - b) for one, two in zip(x, y, strict=True)) / (n + 2) ** 2
    second, first, zeroth = b**2 - q**2 * v22, -2 * (a * b - q**2 * v12), a**2 - q**2 * v11
    root = math.sqrt(first**2 - 4 * second * zeroth)
    return (-first - root) / (2 * second), (-first + root) / (2 * second)
