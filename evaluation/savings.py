"""Relearning as savings: how much sooner a concept is back than a model learns it that never knew it (Ebbinghaus 1885).

A curve a(k) is the share of prompts that have shown the concept by training step k. E is the edited model, N the one
that never knew, B the unedited one.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from evaluation.statistics import Groups, Mean

NEVER = math.inf
"""The step of a prompt that did not show the concept up to the last check."""


def curve(first: Sequence[float], checks: Sequence[int]) -> list[float]:
    """a(k) at 0 and at each of ``checks``; ``first`` are the prompts' first steps with the concept.

    >>> curve([0, 10, 50, NEVER], [10, 50])
    [0.25, 0.5, 0.75]
    """
    return [float(np.mean([step <= check for step in first])) for check in (0, *checks)]


def half_time(first: Sequence[float], checks: Sequence[int]) -> float | None:
    """k_50: where a(k) reaches a half, interpolated in log(1 + k) between checks; None if it does not.

    >>> half_time([0, 0, 9, NEVER], [1, 9]), half_time([9, NEVER, NEVER], [1, 9])
    (0.0, None)
    """
    steps, rates = [0, *checks], curve(first, checks)
    if rates[0] >= 0.5:
        return 0.0
    for number in range(1, len(steps)):
        if rates[number] >= 0.5:
            share = (0.5 - rates[number - 1]) / (rates[number] - rates[number - 1])
            early, late = math.log1p(steps[number - 1]), math.log1p(steps[number])
            return math.expm1(early + share * (late - early))
    return None


@dataclass(frozen=True)
class Savings:
    """What an edited model saves in relearning, beside the model that never knew.

    Attributes:
        last: The last check; a half-time beyond it is not known.
        k50: Half-time of the edited model, None beyond the last check.
        k50_floor: The same of the model that never knew.
        k50_ceiling: The same of the unedited model.
        savings: S = 1 - k_50(E) / k_50(N): 0 learns it like new, 1 has it at once. None if it has no bound, as where
            the model that never knew shows the concept from the start.
        bound: ``exact``, or ``at least`` as k_50(N) is beyond the last check, or ``at most`` as k_50(E) is.
        area: Mean over the checks of a_E - a_N, in points.
        area_low: Lower end of its 95 % interval over prompts, which holds for this training of these models.
        area_high: Upper end.
        area_calibrated: The area as a share of that of the unedited model; None if that is not above 0.
    """

    last: int
    k50: float | None
    k50_floor: float | None
    k50_ceiling: float | None
    savings: float | None
    bound: str
    area: float
    area_low: float
    area_high: float
    area_calibrated: float | None

    @classmethod
    def of(
        cls,
        edited: Sequence[float],
        floor: Sequence[float],
        ceiling: Sequence[float],
        checks: Sequence[int],
        groups: Groups | None = None,
    ) -> "Savings":
        """Compare three models, prompt by prompt.

        Args:
            edited: Of each prompt the first step at which the edited model showed the concept: 0 before any, one of
                ``checks``, or :data:`NEVER`.
            floor: The same of the model that never knew.
            ceiling: The same of the unedited model.
            checks: Training steps after which pictures were drawn, growing.
            groups: Of each prompt what it shares with others; every one is independent if None.

        Raises:
            ValueError: The numbers of prompts differ, or there are none.
        """
        if not len(edited) == len(floor) == len(ceiling) > 0:
            raise ValueError(
                f"{len(edited)}, {len(floor)} and {len(ceiling)} prompts are no three runs of one set; give the same "
                "prompts in the same order."
            )
        k50, k50_floor, k50_ceiling = (half_time(first, checks) for first in (edited, floor, ceiling))
        savings, bound = _savings(k50, k50_floor, checks[-1])
        area = Mean.of(
            [100 * (_height(e, checks) - _height(n, checks)) for e, n in zip(edited, floor, strict=True)], groups
        )
        room = float(
            np.mean([100 * (_height(b, checks) - _height(n, checks)) for b, n in zip(ceiling, floor, strict=True)])
        )
        return cls(
            checks[-1],
            k50,
            k50_floor,
            k50_ceiling,
            savings,
            bound,
            area.mean,
            area.low,
            area.high,
            area.mean / room if room > 0 else None,
        )

    def __str__(self) -> str:
        if self.savings is None:
            return "not defined: the model that never knew needs no training, or both need more than there was"
        return f"{'' if self.bound == 'exact' else f'{self.bound} '}{self.savings:.2f}"

    def steps(self, k50: float | None) -> str:
        """A half-time in words."""
        return f"more than {self.last}" if k50 is None else f"{k50:.1f}"

    def as_dict(self) -> dict[str, Any]:
        """Fields by name, for JSON."""
        return asdict(self)


def _height(first: float, checks: Sequence[int]) -> float:
    """The mean over the checks of one prompt's curve."""
    return float(np.mean([first <= check for check in checks]))


def _savings(k50: float | None, k50_floor: float | None, last: int) -> tuple[float | None, str]:
    if k50_floor == 0 or (k50 is None and k50_floor is None):
        return None, "exact"
    if k50_floor is None:
        # Whoever learns it like new needs more steps than these.
        return 1 - (k50 or 0.0) / last, "at least"
    if k50 is None:
        return 1 - last / k50_floor, "at most"
    return 1 - k50 / k50_floor, "exact"
