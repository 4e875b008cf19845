"""Rates, means and paired comparisons, each with its interval."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.stats import binomtest, bootstrap, t
from torch import Tensor

from diffusion.streams import numpy_stream

CONFIDENCE = 0.95
"""The level of every interval that results carry."""


def wilson_interval(successes: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927), without continuity correction.

    Args:
        successes: How many of the ``n`` cases succeeded.
        n: Number of cases.
        confidence: Level of the interval, in (0, 1).

    Returns:
        Lower and upper end, in [0, 1].

    Raises:
        ValueError: There is no case, or ``successes`` is not within ``0 .. n``.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} cases is no rate; give at least one case and 0 to n successes.")
    interval = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar_p_value(only_first: int, only_second: int) -> float:
    """Exact two-sided McNemar test: the discordant pairs are coin flips if both conditions are alike (McNemar 1947)."""
    discordant = only_first + only_second
    return float(binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0


@dataclass(frozen=True)
class Rate:
    """A proportion of cases with its Wilson 95 % interval.

    Attributes:
        successes: How many cases succeeded.
        n: Number of cases.
        rate: ``successes / n``.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    successes: int
    n: int
    rate: float
    low: float
    high: float

    @classmethod
    def of(cls, outcomes: Sequence[bool] | Tensor) -> "Rate":
        """The rate of true ``outcomes``.

        Raises:
            ValueError: There are no outcomes.
        """
        succeeded = _booleans(outcomes)
        successes, n = int(succeeded.sum()), len(succeeded)
        low, high = wilson_interval(successes, n)
        return cls(successes, n, successes / n, low, high)

    def __str__(self) -> str:
        low, high = 100 * self.low, 100 * self.high
        return f"{100 * self.rate:.1f} % [{low:.1f}, {high:.1f}] ({self.successes}/{self.n})"

    def as_dict(self) -> dict[str, float]:
        """Fields by name, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Mean:
    """The mean of independent values with a 95 % interval, without width where ``n`` is 1.

    The interval is Student's, or a bootstrap's for values that may be far from normal.

    Attributes:
        n: Number of values.
        mean: Their mean.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    n: int
    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float] | Tensor) -> "Mean":
        """The mean of ``values``.

        Raises:
            ValueError: There are no values.
        """
        numbers = np.asarray(values, dtype=np.float64)
        n = len(numbers)
        if n == 0:
            raise ValueError("There is no mean of no values; give at least one.")
        mean = float(numbers.mean())
        margin = 0.0
        if n > 1:
            margin = float(t.ppf((1 + CONFIDENCE) / 2, n - 1) * numbers.std(ddof=1) / math.sqrt(n))
        return cls(n, mean, mean - margin, mean + margin)

    @classmethod
    def bootstrapped(cls, values: Sequence[float] | Tensor, *, seed: int, resamples: int = 9999) -> "Mean":
        """The mean of ``values`` with the bootstrap's interval, bias-corrected and accelerated (Efron 1987).

        Args:
            values: Independent values.
            seed: Of the resamples.
            resamples: How many.

        Raises:
            ValueError: There are no values.
        """
        plain = cls.of(values)
        numbers = np.asarray(values, dtype=np.float64)
        if plain.n == 1 or not np.ptp(numbers):
            return cls(plain.n, plain.mean, plain.mean, plain.mean)
        interval = bootstrap(
            (numbers,),
            np.mean,
            confidence_level=CONFIDENCE,
            n_resamples=resamples,
            rng=numpy_stream(seed, "bootstrap/resamples"),
        ).confidence_interval
        return cls(plain.n, plain.mean, float(interval.low), float(interval.high))

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}] (n = {self.n})"

    def as_dict(self) -> dict[str, float]:
        """Fields by name, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class PairedComparison:
    """How the rate changes between two conditions on the same cases.

    The interval is Newcombe's for the difference of paired proportions (Newcombe 1998, Statistics in Medicine 17,
    2635-2650, method 10): both Wilson intervals, joined by their correlation phi.

    Attributes:
        n: Number of cases.
        only_first: Cases that succeeded under the first condition alone.
        only_second: Cases that succeeded under the second condition alone.
        difference: First rate minus second, in percentage points.
        low: Lower end of the 95 % interval of the difference, in points.
        high: Upper end of the interval, in points.
        p_value: Of the exact two-sided McNemar test.
    """

    n: int
    only_first: int
    only_second: int
    difference: float
    low: float
    high: float
    p_value: float

    @classmethod
    def of(cls, first: Sequence[bool] | Tensor, second: Sequence[bool] | Tensor) -> "PairedComparison":
        """Compare outcomes case by case.

        Args:
            first: Whether each case succeeded under the first condition.
            second: The same cases, in the same order, under the second.

        Raises:
            ValueError: The numbers of outcomes differ or are zero.
        """
        one, two = _booleans(first), _booleans(second)
        if len(one) != len(two):
            raise ValueError(
                f"{len(one)} and {len(two)} outcomes are not pairs; give the same cases in the same order."
            )
        both, neither = int((one & two).sum()), int((~one & ~two).sum())
        only_first, only_second = int((one & ~two).sum()), int((~one & two).sum())
        low, high = _newcombe_interval(both, only_first, only_second, neither)
        return cls(
            n=len(one),
            only_first=only_first,
            only_second=only_second,
            difference=100 * (only_first - only_second) / len(one),
            low=100 * low,
            high=100 * high,
            p_value=mcnemar_p_value(only_first, only_second),
        )

    def __str__(self) -> str:
        interval = f"[{self.low:+.1f}, {self.high:+.1f}]"
        return f"{self.difference:+.1f} points {interval} (p = {self.p_value:.2g}, n = {self.n})"

    def as_dict(self) -> dict[str, float]:
        """Fields by name, for JSON."""
        return asdict(self)


def _newcombe_interval(both: int, only_first: int, only_second: int, neither: int) -> tuple[float, float]:
    n = both + only_first + only_second + neither
    first, second = both + only_first, both + only_second
    first_low, first_high = wilson_interval(first, n)
    second_low, second_high = wilson_interval(second, n)
    below_first, above_first = first / n - first_low, first_high - first / n
    below_second, above_second = second / n - second_low, second_high - second / n

    association = float(both * neither - only_first * only_second)
    if association > 0:
        # Newcombe's continuity correction of the numerator, for positive association only.
        association = max(association - n / 2, 0.0)
    margins = first * (n - first) * second * (n - second)
    phi = association / math.sqrt(margins) if margins else 0.0

    difference = (only_first - only_second) / n
    low = math.sqrt(below_first**2 - 2 * phi * below_first * above_second + above_second**2)
    high = math.sqrt(above_first**2 - 2 * phi * above_first * below_second + below_second**2)
    return difference - low, difference + high


def _booleans(outcomes: Sequence[bool] | Tensor) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
    return np.asarray(outcomes, dtype=np.bool_)
