"""Relearning beside a model that never knew: half-times, savings and areas, by hand and by simulation."""

import math

import numpy as np
import pytest

from evaluation.savings import NEVER, Savings, curve, half_time

CHECKS = (1, 2, 5, 10, 20, 50)


def firsts(*groups: tuple[int, float]) -> list[float]:
    """So many prompts of each first step."""
    return [step for count, step in groups for _ in range(count)]


def test_a_curve_counts_what_has_come_back_by_a_step() -> None:
    assert curve(firsts((1, 0), (2, 5), (1, 50), (4, NEVER)), CHECKS) == [0.125] * 3 + [0.375] * 3 + [0.5]


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        (firsts((4, 0), (4, NEVER)), 0.0),
        (firsts((4, 20), (4, NEVER)), 20.0),
        # A quarter by 5 and three quarters by 10: halfway between, on the scale of log(1 + k).
        (firsts((2, 5), (4, 10), (2, NEVER)), math.sqrt(6 * 11) - 1),
        (firsts((3, 1), (5, NEVER)), None),
    ],
)
def test_half_time_is_interpolated_in_the_logarithm(first: list[float], expected: float | None) -> None:
    found = half_time(first, CHECKS)
    assert found is None if expected is None else found == pytest.approx(expected)


def test_savings_are_one_for_what_is_there_and_zero_for_what_is_new() -> None:
    new, ceiling = firsts((8, 20)), firsts((8, 0))
    asleep = Savings.of(firsts((8, 0)), new, ceiling, CHECKS)
    assert (asleep.savings, asleep.bound) == (1.0, "exact")
    assert asleep.area == pytest.approx(100 * 4 / 6)
    assert asleep.area_calibrated == pytest.approx(1)
    gone = Savings.of(new, new, ceiling, CHECKS)
    assert (gone.savings, gone.area, gone.area_calibrated) == (0.0, 0.0, 0.0)
    new = firsts((4, 20), (4, NEVER))
    half = Savings.of(firsts((4, 10), (4, NEVER)), new, ceiling, CHECKS)
    assert half.savings == pytest.approx(0.5)
    slower = Savings.of(firsts((4, 50), (4, NEVER)), new, ceiling, CHECKS)
    assert slower.savings == pytest.approx(-1.5)


def test_what_lies_beyond_the_last_check_is_a_bound_and_never_dropped() -> None:
    never, ceiling = firsts((8, NEVER)), firsts((8, 0))
    ten = firsts((4, 10), (4, NEVER))
    least = Savings.of(ten, never, ceiling, CHECKS)
    assert (least.savings, least.bound, str(least)) == (pytest.approx(0.8), "at least", "at least 0.80")
    most = Savings.of(never, ten, ceiling, CHECKS)
    assert (most.savings, most.bound) == (pytest.approx(-4), "at most")
    assert most.steps(most.k50) == "more than 50"
    for edited, floor in ((never, never), (never, ceiling)):
        assert Savings.of(edited, floor, ceiling, CHECKS).savings is None
    assert str(Savings.of(never, never, ceiling, CHECKS)).startswith("not defined")


def test_the_areas_interval_covers_what_is_true_of_the_prompts() -> None:
    generator = np.random.default_rng(5)
    steps = np.array([*CHECKS, NEVER])
    chances = {"edited": [0.2, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1], "floor": [0.05, 0.05, 0.1, 0.1, 0.2, 0.2, 0.3]}
    means = {
        name: sum(p * np.mean([step <= check for check in CHECKS]) for p, step in zip(own, steps, strict=True))
        for name, own in chances.items()
    }
    truth = 100 * (means["edited"] - means["floor"])
    covered = 0
    for _ in range(400):
        drawn = {name: generator.choice(steps, 40, p=own).tolist() for name, own in chances.items()}
        found = Savings.of(drawn["edited"], drawn["floor"], [0] * 40, CHECKS)
        covered += found.area_low <= truth <= found.area_high
    assert 0.92 <= covered / 400 <= 0.98


def test_runs_of_other_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^2, 1 and 2 prompts are no three runs of one set"):
        Savings.of([0, 0], [0], [0, 0], CHECKS)
