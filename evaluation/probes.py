"""Whether a score tells models that know something from models that do not."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, product

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, rankdata

from diffusion.streams import numpy_stream
from evaluation.statistics import CONFIDENCE

ALL_LABELLINGS = 200_000
"""Up to so many ways to say which models of a stratum know, the permutation test goes through all."""

NEAR_CHANCE = 0.1
"""An AUC so near to 0.5, or below, is about that of chance."""

Stratum = tuple[Sequence[float], Sequence[float]]
"""Scores of models that know one thing, and of models that do not."""


def auc(knowing: Sequence[float], ignorant: Sequence[float]) -> float:
    """How often a model that knows scores above one that does not, ties counting half (Mann and Whitney 1947).

    >>> auc([3.0, 2.0], [1.0, 2.0])
    0.875

    Raises:
        ValueError: There is no model of a kind.
    """
    if not len(knowing) or not len(ignorant):
        raise ValueError(
            f"{len(knowing)} models that know and {len(ignorant)} that do not tell nothing; give one of each or more."
        )
    above = np.asarray(knowing, dtype=np.float64)[:, None] - np.asarray(ignorant, dtype=np.float64)[None]
    return float(((above > 0) + 0.5 * (above == 0)).mean())


def permutation_p_value(strata: Sequence[Stratum], *, seed: int = 0) -> float:
    """One-sided p: how often labels at random within every stratum give an AUC as large, over all labellings.

    Where these are more than :data:`ALL_LABELLINGS` in a stratum, so many are drawn of all strata together, and the
    true one is counted with them.
    """
    # Pairs won grow with the sum of the knowing models' ranks. Twice a rank is a whole number, so sums are exact.
    ranks = [_doubled_ranks([*knowing, *ignorant]) for knowing, ignorant in strata]
    sizes = [len(knowing) for knowing, _ in strata]
    seen = sum(int(of[:size].sum()) for of, size in zip(ranks, sizes, strict=True))
    if all(math.comb(len(of), size) <= ALL_LABELLINGS for of, size in zip(ranks, sizes, strict=True)):
        ways = Counter({0: 1})
        for of, size in zip(ranks, sizes, strict=True):
            own = Counter(sum(chosen) for chosen in combinations(of.tolist(), size))
            sums: Counter[int] = Counter()
            for (one, count), (other, times) in product(ways.items(), own.items()):
                sums[one + other] += count * times
            ways = sums
        return sum(count for total, count in ways.items() if total >= seen) / ways.total()
    generator = numpy_stream(seed, "probes/labellings")
    drawn = np.zeros(ALL_LABELLINGS, dtype=np.int64)
    for of, size in zip(ranks, sizes, strict=True):
        drawn += [generator.permutation(of)[:size].sum() for _ in range(ALL_LABELLINGS)]
    return float((1 + (drawn >= seen).sum()) / (1 + len(drawn)))


def _doubled_ranks(scores: Sequence[float]) -> NDArray[np.int64]:
    """Twice the rank of each score, ties sharing theirs."""
    return (2 * rankdata(scores)).astype(np.int64)


@dataclass(frozen=True)
class Separation:
    """How well a score tells models that know from models that do not.

    Attributes:
        auc: See :func:`auc`; 0.5 says nothing.
        low: Lower end of the 95 % interval.
        high: Upper end.
        p_value: See :func:`permutation_p_value`.
        knowing: Number of models that know.
        ignorant: Number of models that do not.
    """

    auc: float
    low: float
    high: float
    p_value: float
    knowing: int
    ignorant: int

    @classmethod
    def of(cls, knowing: Sequence[float], ignorant: Sequence[float]) -> "Separation":
        """The separation of two groups of models by their scores; see :meth:`within`."""
        return cls.within([(knowing, ignorant)])

    @classmethod
    def within(cls, strata: Sequence[Stratum]) -> "Separation":
        """The separation of models within each of several strata, such as concepts, with one AUC A for all pairs.

        A stratum's AUC has the variance of Hanley and McNeil (1982) at A, [A(1 - A) + (K+ - 1)(A / (2 - A) - A^2) +
        (K- - 1)(2A^2 / (1 + A) - A^2)] / (K+ K-), with A no nearer to 0 or 1 than half a pair, so that no interval is
        without width; strata weigh as their pairs.

        Raises:
            ValueError: There is no model of a kind in a stratum.
        """
        pairs = [len(knowing) * len(ignorant) for knowing, ignorant in strata]
        total = sum(pairs)
        won = sum(auc(*stratum) * count for stratum, count in zip(strata, pairs, strict=True))
        found = won / total
        area = min(max(found, 0.5 / total), 1 - 0.5 / total)
        variance = 0.0
        for (knowing, ignorant), count in zip(strata, pairs, strict=True):
            own = area * (1 - area)
            own += (len(knowing) - 1) * (area / (2 - area) - area**2)
            own += (len(ignorant) - 1) * (2 * area**2 / (1 + area) - area**2)
            variance += own / count * (count / total) ** 2
        margin = float(norm.ppf((1 + CONFIDENCE) / 2)) * math.sqrt(variance)
        return cls(
            found,
            max(found - margin, 0.0),
            min(found + margin, 1.0),
            permutation_p_value(strata),
            sum(len(knowing) for knowing, _ in strata),
            sum(len(ignorant) for _, ignorant in strata),
        )

    @property
    def is_probe(self) -> bool:
        """Whether the interval leaves out 0.5 and all below it, and labels at random seldom do as well.

        Of few models the interval alone says too much.
        """
        return self.low > 0.5 and self.p_value < 1 - CONFIDENCE

    @property
    def tells_nothing(self) -> bool:
        """Whether it tells models that know from others no better than chance, or the wrong way round."""
        return self.auc <= 0.5 + NEAR_CHANCE

    def as_dict(self) -> dict[str, float]:
        """Fields by name, for JSON."""
        return asdict(self)
