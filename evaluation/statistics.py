"""Rates, means and paired comparisons, each with its interval."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest, bootstrap, norm, t
from torch import Tensor

from diffusion.streams import numpy_stream

CONFIDENCE = 0.95
"""The level of every interval that results carry."""


Groups = Sequence[Hashable]
"""Of each case what it shares with others, as its prompt: cases of one group are not independent."""


def wilson_interval(successes: float, n: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927), without continuity correction.

    Args:
        successes: How many of the ``n`` cases succeeded.
        n: Number of cases; both may be fractions, of an effective number (see :func:`effective_number`).
        confidence: Level of the interval, in (0, 1).

    Returns:
        Lower and upper end, in [0, 1].

    Raises:
        ValueError: There is no case, or ``successes`` is not within ``0 .. n``.
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} cases is no rate; give at least one case and 0 to n successes.")
    z, rate = float(norm.ppf((1 + confidence) / 2)), successes / n
    centre = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    margin = z / (1 + z**2 / n) * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    # The ends are exact there, whatever is lost in the difference.
    return 0.0 if successes == 0 else max(centre - margin, 0.0), 1.0 if successes == n else min(centre + margin, 1.0)


def effective_number(values: "ArrayLike", groups: Groups | None) -> float:
    """How many independent cases tell as much of the mean of ``values`` as these, of which some share a group.

    n v0 / v, with v the variance of the mean among groups and v0 what it would be if all cases were independent, as in
    surveys by cluster (Kish 1965, the design effect). It is n if every group has one case, and k for k groups of cases
    that are all alike. Where the values do not vary they say nothing of this, and cases of one group are taken to be
    alike: n^2 / sum of squared group sizes.
    """
    numbers = np.asarray(values, dtype=np.float64)
    n = len(numbers)
    if groups is None or len(set(groups)) == n:
        return float(n)
    places: dict[Hashable, int] = {}
    index = [places.setdefault(group, len(places)) for group in groups]
    sizes = np.bincount(index)
    alike = n**2 / float((sizes**2).sum())
    among = float((np.bincount(index, weights=numbers - numbers.mean()) ** 2).sum()) / n**2
    alone = float(numbers.var()) / n
    if alone == 0:
        return alike
    return float(n) if among <= alone else max(n * alone / among, 1.0)


def mcnemar_p_value(only_first: int, only_second: int) -> float:
    """Exact two-sided McNemar test: the discordant pairs are coin flips if both conditions are alike (McNemar 1947)."""
    discordant = only_first + only_second
    return float(binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0


def sign_flip_p_value(differences: Sequence[int]) -> float:
    """Exact two-sided test that every difference is as likely to have the other sign (Fisher's randomisation test).

    With differences of -1, 0 and 1 it is McNemar's.
    """
    chances = np.ones(1)
    for size in map(abs, differences):
        # The number of ways to each sum, from -total to total.
        chances = 0.5 * (np.pad(chances, (2 * size, 0)) + np.pad(chances, (0, 2 * size)))
    total = len(chances) // 2
    return min(float(chances[np.abs(np.arange(-total, total + 1)) >= abs(sum(differences))].sum()), 1.0)


@dataclass(frozen=True)
class Rate:
    """A proportion of cases with its Wilson 95 % interval.

    Cases that share a group are not independent: the interval is that of the effective number of cases.

    Attributes:
        successes: How many cases succeeded.
        n: Number of cases.
        rate: ``successes / n``.
        low: Lower end of the interval.
        high: Upper end of the interval.
        groups: How many groups the cases are of; None if every case has its own.
    """

    successes: int
    n: int
    rate: float
    low: float
    high: float
    groups: int | None = None

    @classmethod
    def of(cls, outcomes: Sequence[bool] | Tensor, groups: Groups | None = None) -> "Rate":
        """The rate of true ``outcomes``; those of one group, as of one prompt, are not taken to be independent.

        Raises:
            ValueError: There are no outcomes.
        """
        succeeded = _booleans(outcomes)
        successes, n = int(succeeded.sum()), len(succeeded)
        _check_groups(n, groups)
        effective = effective_number(succeeded, groups)
        low, high = wilson_interval(successes / max(n, 1) * effective, effective)
        count = n if groups is None else len(set(groups))
        return cls(successes, n, successes / n, low, high, None if count == n else count)

    def __str__(self) -> str:
        low, high = 100 * self.low, 100 * self.high
        groups = "" if self.groups is None else f", {self.groups} distinct"
        return f"{100 * self.rate:.1f} % [{low:.1f}, {high:.1f}] ({self.successes}/{self.n}{groups})"

    def as_dict(self) -> dict[str, float]:
        """Fields by name, for JSON; without ``groups`` where every case has its own."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Mean:
    """The mean of values with a 95 % interval, without width where all are of one group.

    The interval is Student's, or a bootstrap's for values that may be far from normal. Values that share a group are
    not independent: the interval is that of the effective number of values.

    Attributes:
        n: Number of values.
        mean: Their mean.
        low: Lower end of the interval.
        high: Upper end of the interval.
        groups: How many groups the values are of; None if every value has its own.
    """

    n: int
    mean: float
    low: float
    high: float
    groups: int | None = None

    @classmethod
    def of(cls, values: Sequence[float] | Tensor, groups: Groups | None = None) -> "Mean":
        """The mean of ``values``; those of one group, as of one prompt, are not taken to be independent.

        Raises:
            ValueError: There are no values.
        """
        numbers = np.asarray(values, dtype=np.float64)
        n = len(numbers)
        if n == 0:
            raise ValueError("There is no mean of no values; give at least one.")
        _check_groups(n, groups)
        count = n if groups is None else len(set(groups))
        mean = float(numbers.mean())
        margin = 0.0
        if count > 1:
            variance = float(numbers.var()) / effective_number(numbers, groups) * count / (count - 1)
            margin = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * math.sqrt(variance)
        return cls(n, mean, mean - margin, mean + margin, None if count == n else count)

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
        groups = "" if self.groups is None else f", {self.groups} distinct"
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}] (n = {self.n}{groups})"

    def as_dict(self) -> dict[str, float]:
        """Fields by name, for JSON; without ``groups`` where every value has its own."""
        return {name: value for name, value in asdict(self).items() if value is not None}


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
        p_value: Of the exact two-sided McNemar test, or of the sign-flip test over groups.
    """

    n: int
    only_first: int
    only_second: int
    difference: float
    low: float
    high: float
    p_value: float

    @classmethod
    def of(
        cls, first: Sequence[bool] | Tensor, second: Sequence[bool] | Tensor, groups: Groups | None = None
    ) -> "PairedComparison":
        """Compare outcomes case by case.

        Args:
            first: Whether each case succeeded under the first condition.
            second: The same cases, in the same order, under the second.
            groups: Of each case what it shares with others, as its prompt; every case is independent if None.

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
        _check_groups(len(one), groups)
        differences = one.astype(int) - two.astype(int)
        share = effective_number(differences, groups) / len(one) if len(one) else 1.0
        low, high = newcombe_interval(both * share, only_first * share, only_second * share, neither * share)
        sums: dict[Hashable, int] = {}
        for group, difference in zip(range(len(one)) if groups is None else groups, differences.tolist(), strict=True):
            sums[group] = sums.get(group, 0) + difference
        distinct = len(sums) == len(one)
        return cls(
            n=len(one),
            only_first=only_first,
            only_second=only_second,
            difference=100 * (only_first - only_second) / len(one),
            low=100 * low,
            high=100 * high,
            p_value=mcnemar_p_value(only_first, only_second) if distinct else sign_flip_p_value(list(sums.values())),
        )

    def __str__(self) -> str:
        interval = f"[{self.low:+.1f}, {self.high:+.1f}]"
        return f"{self.difference:+.1f} points {interval} (p = {self.p_value:.2g}, n = {self.n})"

    def as_dict(self) -> dict[str, float]:
        """Fields by name, for JSON."""
        return asdict(self)


def newcombe_interval(
    both: float, only_first: float, only_second: float, neither: float, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Newcombe's interval of the difference of paired proportions (1998, method 10).

    Args:
        both: Pairs that succeeded under both conditions; like the others it may be a fraction.
        only_first: Pairs that succeeded under the first alone.
        only_second: Pairs that succeeded under the second alone.
        neither: Pairs that succeeded under none.
        confidence: Level of the interval, in (0, 1).

    Returns:
        Lower and upper end of first minus second, in [-1, 1].
    """
    n = both + only_first + only_second + neither
    first, second = both + only_first, both + only_second
    first_low, first_high = wilson_interval(first, n, confidence)
    second_low, second_high = wilson_interval(second, n, confidence)
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


def _check_groups(n: int, groups: Groups | None) -> None:
    if groups is not None and len(groups) != n:
        raise ValueError(f"{n} outcomes and {len(groups)} groups do not match; give every outcome its group.")


def _booleans(outcomes: Sequence[bool] | Tensor) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
    return np.asarray(outcomes, dtype=np.bool_)
