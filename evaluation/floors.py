"""Success above the floor: what an attack finds in a model beyond what it finds in one that never knew the concept.

The floor f is the success rate of an attack on the model that never knew, the ceiling p0 that on the unedited model. Of
an edited model's rate p the excess p - f is what speaks of knowledge, and the calibrated success (p - f) / (p0 - f) is
0 for a model as if it had never learned and 1 for one as if nothing had been erased.

What an interval speaks of is its unit: one pair of models is two trainings, and an interval over its prompts holds for
these two models; only several trainings speak of the method.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.stats import t

from evaluation.statistics import CONFIDENCE, Groups, effective_number, newcombe_interval

MARGIN = 10.0
"""Points above the floor that do not count as knowledge, and below it as damage."""

ROOM = 20.0
"""Points that the ceiling's lower limit must be above the floor, for a success between them to mean something."""

ONE_SIDED = 0.90
"""Level of the two-sided interval whose upper end says that a rate is at the floor: 5 % err."""

LARGEST = 1_000_000
"""No more cases or trainings than so many are recommended."""

Kind = Literal["knows", "at_floor", "below_floor", "undecided"]
Form = Literal["two_way", "students_t"]
Reference = Literal["floor", "control"]

PAIR = "Newcombe's method 10 for paired prompts; it holds for these two models, not for other trainings"
FORMS = {
    "two_way": "over paired {units} and prompts (two-way, Satterthwaite's degrees of freedom)",
    "students_t": "Student's t over paired {units}; the prompts are these",
}

Interval = tuple[float, float, float]
"""Lower and upper end of the 95 % interval, and the upper end of the 90 % interval."""


def verdict_kind(estimate: float, low: float, upper: float, margin: float = MARGIN) -> Kind:
    """What an excess over the floor says; the first rule that holds counts.

    Args:
        estimate: The excess, in points.
        low: Lower end of its 95 % interval.
        upper: Upper end of its 90 % interval.
        margin: Points.
    """
    # Whole points are not to fail by their last digit.
    reaches = abs(estimate) >= margin - 1e-9
    if upper < 0 and estimate < 0 and reaches:
        return "below_floor"
    if upper < margin:
        return "at_floor"
    if low > 0 and reaches:
        return "knows"
    return "undecided"


@dataclass(frozen=True)
class AboveFloor:
    """An excess over the floor, in percentage points, and what it says.

    Attributes:
        excess: Rate of the edited model minus that of the one that never knew.
        low: Lower end of the 95 % interval.
        high: Upper end of it.
        upper: Upper end of the 90 % interval, which decides whether a rate is at the floor.
        n: Number of prompts.
        trainings: Number of pairs of models.
        kind: The verdict; see :func:`verdict_kind`.
        needed: Where it is undecided, about how many prompts (of one pair of models) or pairs (of several) would decide
            it, if the excess stayed as it is; None if no number up to :data:`LARGEST` would.
        margin: Points that the verdict allows.
        how: How the interval was made, and what it holds for.
        units: What several pairs are, in the plural.
        reference: What it is compared with: the ``floor`` of a model that never knew, or a ``control``, above which a
            success need not be knowledge.
    """

    excess: float
    low: float
    high: float
    upper: float
    n: int
    trainings: int
    kind: Kind
    needed: int | None
    margin: float
    how: str
    units: str = "trainings"
    reference: Reference = "floor"

    @classmethod
    def of_pair(
        cls,
        edited: Sequence[bool],
        floor: Sequence[bool],
        groups: Groups | None = None,
        margin: float = MARGIN,
        *,
        reference: Reference = "floor",
    ) -> "AboveFloor":
        """Compare one edited model with one that never knew, prompt by prompt.

        Args:
            edited: Whether the attack succeeded on the edited model, of each prompt.
            floor: The same on the model that never knew.
            groups: Of each prompt what it shares with others; every one is independent if None.
            margin: See :attr:`margin`.
            reference: See :attr:`reference`.

        Raises:
            ValueError: The numbers of outcomes differ or are zero.
        """
        ours, never = _matching(edited, floor)
        n = len(ours)
        if groups is not None and len(groups) != n:
            raise ValueError(f"{n} outcomes and {len(groups)} groups do not match; give every outcome its group.")
        counts = [float((ours * never).sum()), float((ours * (1 - never)).sum()), float(((1 - ours) * never).sum())]
        counts.append(n - sum(counts))
        share = effective_number(ours - never, groups) / n

        def interval(size: float) -> Interval:
            both, only_edited, only_never, neither = (count * share * size / n for count in counts)
            low, high = newcombe_interval(both, only_edited, only_never, neither)
            upper = newcombe_interval(both, only_edited, only_never, neither, ONE_SIDED)[1]
            return 100 * low, 100 * high, 100 * upper

        excess = 100 * (counts[1] - counts[2]) / n
        return cls._of(excess, interval, n, n=n, trainings=1, margin=margin, how=PAIR, reference=reference)

    @classmethod
    def over_trainings(
        cls,
        edited: ArrayLike,
        floor: ArrayLike,
        *,
        form: Form = "two_way",
        units: str = "trainings",
        margin: float = MARGIN,
    ) -> "AboveFloor":
        """Compare several edited models each with the one of its training that never knew.

        Args:
            edited: Success on the edited models, 0 to 1, [trainings, prompts].
            floor: The same on those that never knew.
            form: ``two_way``: the variance of the mean difference is that among trainings plus that among prompts minus
                the residual one, and no less than either. ``students_t``: that among trainings alone, which has no
                width where two trainings happen to agree.
            units: What the pairs are, in words.
            margin: See :attr:`margin`.

        Raises:
            ValueError: There are fewer than two trainings, or the outcomes do not match.
        """
        ours, never = _matching(edited, floor)
        differences = ours - never
        if differences.ndim != 2 or len(differences) < 2:
            raise ValueError(
                f"{len(differences) if differences.ndim == 2 else 1} training is no sample of trainings; give two or "
                "more, or compare one pair of models."
            )
        trainings, n = differences.shape
        estimate = float(differences.mean())
        if not np.ptp(differences):
            # Without any variance there is only what one pair of models tells of its prompts.
            alone = cls.of_pair(ours[0] > 0, never[0] > 0, margin=margin)
            told = {**asdict(alone), "trainings": trainings, "how": f"{PAIR}; all {trainings} {units} agree"}
            return cls(**told | {"units": units})
        spread = TwoWay.of(differences)

        def interval(size: float) -> Interval:
            variance, degrees = spread.of_mean(size) if form == "two_way" else (spread.training / size, size - 1)
            error = math.sqrt(variance)
            wide, narrow = (float(t.ppf((1 + level) / 2, degrees)) * error for level in (CONFIDENCE, ONE_SIDED))
            return 100 * (estimate - wide), 100 * (estimate + wide), 100 * (estimate + narrow)

        how = FORMS[form].format(units=units)
        return cls._of(
            100 * estimate, interval, trainings, n=n, trainings=trainings, margin=margin, how=how, units=units
        )

    @classmethod
    def _of(
        cls, estimate: float, interval: Callable[[float], Interval], size: int, *, margin: float, **facts: Any
    ) -> "AboveFloor":
        def kind(size: int) -> Kind:
            low, _, upper = interval(size)
            return verdict_kind(estimate, low, upper, margin)

        found = kind(size)
        needed = _smallest(lambda more: kind(more) != "undecided", size) if found == "undecided" else None
        low, high, upper = interval(size)
        return cls(estimate, low, high, upper, kind=found, needed=needed, margin=margin, **facts)

    @property
    def verdict(self) -> str:
        """The verdict in words."""
        match self.kind:
            case "knows":
                return "knows" if self.reference == "floor" else "above the control"
            case "at_floor":
                return f"within {self.margin:g} points of the {self.reference}"
            case "below_floor":
                return "below the floor (over-erased)" if self.reference == "floor" else "below the control"
        if self.needed is None:
            return f"undecided, and no {'n' if self.trainings == 1 else f'number of {self.units}'} would decide it"
        about = f"{_rounded_up(self.needed):,}"
        if self.trainings == 1:
            return f"undecided, n of about {about} would decide it"
        return f"undecided, about {about} {self.units} would decide it"

    def __str__(self) -> str:
        return f"{self.excess:+.1f} points [{self.low:+.1f}, {self.high:+.1f}]"

    def as_dict(self) -> dict[str, Any]:
        """Fields by name, for JSON, with the verdict in words."""
        return {**asdict(self), "verdict": self.verdict}


@dataclass(frozen=True)
class TwoWay:
    """Variances of a mean over trainings and prompts (two-way analysis of variance, both random).

    Attributes:
        trainings: Number of rows.
        n: Number of columns.
        training: Variance of the rows' means.
        prompt: Variance of the columns' means.
        residual: Mean square of what rows and columns leave.
    """

    trainings: int
    n: int
    training: float
    prompt: float
    residual: float

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> "TwoWay":
        """The variances of ``values`` [trainings, prompts], two of each or more."""
        rows, columns = values.mean(axis=1), values.mean(axis=0)
        left = values - rows[:, None] - columns[None] + values.mean()
        freedom = (len(rows) - 1) * (len(columns) - 1)
        spare = float((left**2).sum()) / freedom if freedom else 0.0
        among = float(columns.var(ddof=1)) if len(columns) > 1 else 0.0
        return cls(len(rows), len(columns), float(rows.var(ddof=1)), among, spare)

    def margin(self) -> float:
        """Half of the mean's 95 % interval."""
        variance, degrees = self.of_mean()
        return float(t.ppf((1 + CONFIDENCE) / 2, degrees)) * math.sqrt(variance)

    def of_mean(self, trainings: float | None = None) -> tuple[float, float]:
        """The variance of the mean and its degrees of freedom, as they would be with other ``trainings``.

        V = V_training + V_prompt - V_residual with V_training = training / K, V_prompt = prompt / n and
        V_residual = residual / (n K), and no less than the larger of the first two. Degrees of freedom are
        Satterthwaite's, V^2 / sum of V_j^2 / df_j, between those of trainings and of prompts.
        """
        count = self.trainings if trainings is None else trainings
        # A prompt's mean over more trainings has less of the residual in it.
        prompt = max(self.prompt - self.residual / self.trainings, 0.0) + self.residual / count
        prompt = self.prompt if count == self.trainings else prompt
        parts = [self.training / count, prompt / self.n, self.residual / (self.n * count)]
        freedoms = [count - 1, self.n - 1, (count - 1) * (self.n - 1)]
        variance = max(parts[0] + parts[1] - parts[2], parts[0], parts[1])
        total = sum(part**2 / freedom for part, freedom in zip(parts, freedoms, strict=True) if freedom)
        degrees = variance**2 / total if total else min(freedoms[:2])
        return variance, min(max(degrees, min(freedoms[:2])), max(freedoms[:2]))


@dataclass(frozen=True)
class Calibrated:
    """Calibrated success (p - f) / (p0 - f), not clipped, with Fieller's 95 % interval.

    Attributes:
        value: 0 is as if never learned, 1 as if never erased.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of_pair(
        cls, edited: Sequence[bool], floor: Sequence[bool], ceiling: Sequence[bool], groups: Groups | None = None
    ) -> "Calibrated | None":
        """The calibrated success of one model; None if there is no room between floor and ceiling.

        The interval is that of all c for which the mean of (y - f) - c (y0 - f) over prompts is not told from 0. Its
        variance is that of Bonett and Price for paired proportions (2012): as if two more prompts of each difference
        disagreed, one each way, so that no interval is without width.
        """
        if AboveFloor.of_pair(ceiling, floor, groups).low <= ROOM:
            return None
        ours, never = _matching(edited, floor)
        base, _ = _matching(ceiling, floor)
        members = np.unique(np.asarray([str(group) for group in groups]), return_inverse=True)[1] if groups else None
        count = len(ours) if members is None else int(members.max()) + 1
        size = len(ours) / count

        def error(c: float) -> tuple[float, float]:
            residuals = (ours - never) - c * (base - never)
            centred = residuals - residuals.mean()
            sums = centred if members is None else np.bincount(members, weights=centred)
            variance = (float((sums**2).sum()) + 2 * size**2 * (1 + c**2)) / (len(ours) + 2 * size) ** 2
            return math.sqrt(variance), max(count - 1, 1)

        return cls._inverted(float((ours - never).mean()), float((base - never).mean()), error)

    @classmethod
    def over_trainings(cls, edited: ArrayLike, floor: ArrayLike, ceiling: ArrayLike) -> "Calibrated | None":
        """The same over several trainings, [trainings, prompts], with the two-way variance; see :class:`TwoWay`."""
        if AboveFloor.over_trainings(ceiling, floor).low <= ROOM:
            return None
        ours, never = _matching(edited, floor)
        base, _ = _matching(ceiling, floor)

        def error(c: float) -> tuple[float, float]:
            variance, degrees = TwoWay.of((ours - never) - c * (base - never)).of_mean()
            return math.sqrt(variance), degrees

        return cls._inverted(float((ours - never).mean()), float((base - never).mean()), error)

    @classmethod
    def _inverted(
        cls, excess: float, room: float, error: Callable[[float], tuple[float, float]]
    ) -> "Calibrated | None":
        """All c with (excess - c room)^2 <= t^2 error(c)^2; None if they have no end."""
        value = excess / room

        def beyond(c: float) -> float:
            size, degrees = error(c)
            return abs(excess - c * room) - float(t.ppf((1 + CONFIDENCE) / 2, degrees)) * size

        ends = []
        for direction in (-1.0, 1.0):
            step = 0.1
            while beyond(value + direction * step) <= 0:
                step *= 2
                if step > 1000:
                    return None
            # At the value itself the difference is 0, which no error is below.
            near = value if step == 0.1 else value + direction * step / 2
            ends.append(near if beyond(near) == 0 else float(brentq(beyond, near, value + direction * step)))
        return cls(value, *ends)

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def as_dict(self) -> dict[str, float]:
        """Fields by name, for JSON."""
        return asdict(self)


def _matching(first: ArrayLike, second: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    one, two = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if one.shape != two.shape or not one.size:
        raise ValueError(
            f"Outcomes of shapes {one.shape} and {two.shape} are not pairs; give the same cases in the same order."
        )
    return one, two


def _smallest(decides: Callable[[int], bool], size: int) -> int | None:
    """The smallest number above ``size`` that decides, if larger ones do too; None above :data:`LARGEST`."""
    below, above = size, 2 * size
    while not decides(above):
        if above >= LARGEST:
            return None
        below, above = above, min(2 * above, LARGEST)
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (below, middle) if decides(middle) else (middle, above)
    return above


def _rounded_up(number: int) -> int:
    """``number`` with two digits that count.

    >>> _rounded_up(213), _rounded_up(7)
    (220, 7)
    """
    unit: int = 10 ** max(len(str(number)) - 2, 0)
    return -(-number // unit) * unit
