"""Whether a score tells models that know something from models that do not."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from diffusion.streams import numpy_stream
from evaluation.statistics import CONFIDENCE

ALL_LABELLINGS = 200_000
"""Up to so many ways to say which models know, the permutation test goes through all."""


NEAR_CHANCE = 0.1
"""An AUC so near to 0.5, or below, is about that of chance."""


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


def permutation_p_value(knowing: Sequence[float], ignorant: Sequence[float], *, seed: int = 0) -> float:
    """One-sided p: how often labels at random give an AUC as large, over all labellings.

    Where these are more than :data:`ALL_LABELLINGS`, so many are drawn, and the true one is counted with them.
    """
    scores = np.asarray([*knowing, *ignorant], dtype=np.float64)
    size, count = len(knowing), len(scores)
    # The AUC grows with the sum of the knowing models' ranks.
    ranks = np.asarray([(scores < score).sum() + ((scores == score).sum() + 1) / 2 for score in scores])
    seen = float(ranks[:size].sum()) - 1e-9
    if math.comb(count, size) <= ALL_LABELLINGS:
        sums: NDArray[np.float64] = np.asarray(
            [ranks[list(chosen)].sum() for chosen in combinations(range(count), size)]
        )
        return float((sums >= seen).mean())
    generator = numpy_stream(seed, "probes/labellings")
    drawn = np.asarray([generator.permutation(ranks)[:size].sum() for _ in range(ALL_LABELLINGS)])
    return float((1 + (drawn >= seen).sum()) / (1 + len(drawn)))


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
        """The separation of two groups of models by their scores, with the interval of Hanley and McNeil (1982).

        The variance is [A(1 - A) + (K+ - 1)(A / (2 - A) - A^2) + (K- - 1)(2A^2 / (1 + A) - A^2)] / (K+ K-), with A no
        nearer to 0 or 1 than half a pair, so that no interval is without width.

        Raises:
            ValueError: There is no model of a kind.
        """
        found = auc(knowing, ignorant)
        positive, negative = len(knowing), len(ignorant)
        pairs = positive * negative
        area = min(max(found, 0.5 / pairs), 1 - 0.5 / pairs)
        variance = area * (1 - area)
        variance += (positive - 1) * (area / (2 - area) - area**2)
        variance += (negative - 1) * (2 * area**2 / (1 + area) - area**2)
        margin = float(norm.ppf((1 + CONFIDENCE) / 2)) * math.sqrt(variance / pairs)
        p_value = permutation_p_value(knowing, ignorant)
        return cls(found, max(found - margin, 0.0), min(found + margin, 1.0), p_value, positive, negative)

    @property
    def is_probe(self) -> bool:
        """Whether the interval leaves out 0.5 and all below it."""
        return self.low > 0.5

    @property
    def tells_nothing(self) -> bool:
        """Whether it tells models that know from others no better than chance, or the wrong way round."""
        return self.auc <= 0.5 + NEAR_CHANCE

    def as_dict(self) -> dict[str, float]:
        """Fields by name, for JSON."""
        return asdict(self)
