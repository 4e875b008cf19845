"""Success above the floor: intervals from their formulas, verdicts by their rules, coverage by simulation."""

import json

import numpy as np
import pytest
from scipy.stats import norm, t

from evaluation.floors import AboveFloor, Calibrated, verdict_kind
from tests.oracles import floors as oracle


def outcomes(both: int, only_first: int, only_second: int, neither: int) -> tuple[list[bool], list[bool]]:
    first = [True] * (both + only_first) + [False] * (only_second + neither)
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    return first, second


TABLES = [(20, 30, 4, 10), (0, 10, 20, 0), (10, 0, 0, 54), (0, 0, 0, 32), (3, 2, 2, 1), (1, 8, 3, 20), (40, 12, 0, 12)]


@pytest.mark.parametrize("counts", TABLES)
def test_an_excess_of_one_pair_has_newcombes_intervals(counts: tuple[int, int, int, int]) -> None:
    above = AboveFloor.of_pair(*outcomes(*counts))
    n = sum(counts)
    low, high = (100 * end for end in oracle.newcombe(*counts, 0.95))
    upper = 100 * oracle.newcombe(*counts, 0.9)[1]
    assert (above.n, above.trainings) == (n, 1)
    assert above.excess == pytest.approx(100 * (counts[1] - counts[2]) / n)
    assert (above.low, above.high, above.upper) == pytest.approx((low, high, upper), abs=1e-9)
    assert above.kind == oracle.verdict(above.excess, low, upper, 10)
    assert "these two models" in above.how


@pytest.mark.parametrize(
    ("estimate", "low", "upper", "kind"),
    [
        (-30, -45, -15, "below_floor"),
        # Below zero for certain, but not by the margin.
        (-6, -9, -1, "at_floor"),
        # By the margin, but perhaps not below zero.
        (-12, -30, 3, "at_floor"),
        (-12, -30, 11, "undecided"),
        (0, -9, 8, "at_floor"),
        # Above zero for certain, and yet within the margin: the margin comes first.
        (5, 1, 9, "at_floor"),
        # Above zero for certain, perhaps beyond the margin, but the estimate is not.
        (8, 2, 14, "undecided"),
        (10, 0.1, 20, "knows"),
        (10, 0, 20, "undecided"),
        (40, 25, 52, "knows"),
        # Upper limits that touch are not below.
        (5, -1, 10, "undecided"),
        (-10, -20, 0, "at_floor"),
        (-10, -20, -0.1, "below_floor"),
    ],
)
def test_the_first_rule_that_holds_is_the_verdict(estimate: float, low: float, upper: float, kind: str) -> None:
    assert verdict_kind(estimate, low, upper) == kind == oracle.verdict(estimate, low, upper, 10)


def test_verdicts_in_words() -> None:
    sentences = {
        (20, 30, 4, 10): "knows",
        (0, 0, 0, 64): "within 10 points of the floor",
        (0, 0, 20, 12): "below the floor (over-erased)",
    }
    assert {counts: AboveFloor.of_pair(*outcomes(*counts)).verdict for counts in sentences} == sentences
    undecided = AboveFloor.of_pair(*outcomes(1, 4, 1, 10))
    assert undecided.kind == "undecided"
    assert undecided.verdict == f"undecided, n of about {undecided.needed} would decide it"
    assert json.loads(json.dumps(undecided.as_dict()))["verdict"] == undecided.verdict
    # Three points cannot be told from two when either is at the limit itself.
    never = AboveFloor(10, -1, 21, 20, 16, 1, "undecided", None, 10, "")
    assert never.verdict == "undecided, and no n would decide it"


@pytest.mark.parametrize("counts", [(1, 4, 1, 10), (3, 2, 2, 1), (2, 6, 4, 20), (10, 3, 3, 16), (2, 5, 5, 4)])
def test_the_number_that_decides_is_the_first_that_does(counts: tuple[int, int, int, int]) -> None:
    above = AboveFloor.of_pair(*outcomes(*counts))
    assert above.kind == "undecided"
    assert above.needed == oracle.needed(counts, 10)


def test_prompts_that_repeat_each_other_tell_no_more_than_one_of_them() -> None:
    first, second, base = [*outcomes(4, 6, 1, 9), [True] * 20]
    prompts = [f"prompt {number}" for number in range(20)] * 3
    once, often = AboveFloor.of_pair(first, second), AboveFloor.of_pair(first * 3, second * 3, prompts)
    assert (often.low, often.high, often.upper) == pytest.approx((once.low, once.high, once.upper))
    alone, repeated = (
        Calibrated.of_pair(first, second, base),
        Calibrated.of_pair(first * 3, second * 3, base * 3, prompts),
    )
    assert alone is not None and repeated is not None
    assert (repeated.low, repeated.high) == pytest.approx((alone.low, alone.high))


@pytest.mark.parametrize("shape", [(2, 7), (5, 12), (3, 40)])
def test_several_trainings_have_the_two_way_interval_and_students(shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(3)
    edited, floor = generator.random(shape) < 0.7, generator.random(shape) < 0.4
    differences = (edited.astype(int) - floor).tolist()
    estimate = 100 * np.mean(differences)

    above = AboveFloor.over_trainings(edited, floor)
    variance, degrees = oracle.two_way(differences)
    wide, narrow = (100 * t.ppf(level, degrees) * variance**0.5 for level in (0.975, 0.95))
    assert (above.n, above.trainings) == (shape[1], shape[0])
    ends = (estimate - wide, estimate + wide, estimate + narrow)
    assert (above.low, above.high, above.upper) == pytest.approx(ends, abs=1e-9)

    above = AboveFloor.over_trainings(edited, floor, form="students_t", units="seeds of erasure")
    means = [sum(row) / len(row) for row in differences]
    error = 100 * (sum((mean - sum(means) / len(means)) ** 2 for mean in means) / (len(means) - 1) / len(means)) ** 0.5
    wide = float(t.ppf(0.975, len(means) - 1)) * error
    assert (above.low, above.high) == pytest.approx((estimate - wide, estimate + wide), abs=1e-9)
    assert "Student's t over paired seeds of erasure" in above.how


def test_trainings_that_agree_by_chance_are_not_certain() -> None:
    # Both differ from the floor in as many prompts, not the same ones.
    edited = np.array([[1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0]])
    above = AboveFloor.over_trainings(edited, np.zeros((2, 8)))
    assert above.excess == 25
    assert above.low < 0 < 50 < above.high
    assert above.kind == "undecided"
    # Nothing differs anywhere: what one pair tells of its prompts.
    same = AboveFloor.over_trainings(np.zeros((3, 8)), np.zeros((3, 8)))
    alone = AboveFloor.of_pair([False] * 8, [False] * 8)
    assert (same.low, same.high, same.trainings) == (alone.low, alone.high, 3)


def test_more_trainings_are_recommended_where_trainings_are_lacking() -> None:
    generator = np.random.default_rng(5)
    # The excess of a training is its own, and prompts hardly differ.
    edited = generator.random((2, 64)) < np.array([[0.6], [0.1]])
    above = AboveFloor.over_trainings(edited, np.zeros((2, 64)))
    assert above.kind == "undecided"
    assert above.needed is not None
    assert 2 < above.needed < 30
    assert above.verdict == f"undecided, about {above.needed} trainings would decide it"


@pytest.mark.parametrize("seed", range(4))
def test_calibrated_success_has_fiellers_interval(seed: int) -> None:
    generator = np.random.default_rng(seed)
    edited, floor, ceiling = (generator.random((3, 64)) < np.array([[0.5], [0.1], [0.9]])).tolist()
    x, y = ([one - two for one, two in zip(first, floor, strict=True)] for first in (edited, ceiling))
    found = Calibrated.of_pair(edited, floor, ceiling)
    assert found is not None
    assert found.value == pytest.approx(sum(x) / sum(y))
    assert (found.low, found.high) == pytest.approx(oracle.fieller(x, y), abs=1e-9)


def test_calibration_is_exact_at_both_ends_and_asks_for_room() -> None:
    floor, ceiling = outcomes(4, 0, 40, 20)
    never, base = floor, ceiling
    nothing, everything = Calibrated.of_pair(never, never, base), Calibrated.of_pair(base, never, base)
    assert nothing is not None and everything is not None
    assert (nothing.value, everything.value) == (0, 1)
    assert nothing.low < 0 < nothing.high
    assert everything.low < 1 < everything.high
    # What decides is the lower limit, not the difference, of which all have more than 20 points.
    for successes in range(5, 20):
        room = 100 * oracle.newcombe(0, successes, 0, 20 - successes, 0.95)[0] > 20
        found = Calibrated.of_pair([False] * 20, [False] * 20, [True] * successes + [False] * (20 - successes))
        assert (found is not None) == room == (successes >= 10)


@pytest.mark.parametrize("call", [AboveFloor.of_pair, AboveFloor.over_trainings])
def test_outcomes_that_do_not_match_are_refused(call) -> None:
    with pytest.raises(ValueError, match="are not pairs"):
        call([True, False], [True])
    with pytest.raises(ValueError, match="are not pairs"):
        call([], [])


def test_one_training_is_no_sample_of_trainings() -> None:
    with pytest.raises(ValueError, match="1 training is no sample"):
        AboveFloor.over_trainings([[True, False]], [[True, True]])
    with pytest.raises(ValueError, match="2 outcomes and 1 groups"):
        AboveFloor.of_pair([True, False], [True, True], ["a"])


def correlated(generator: np.random.Generator, rates: list[float], n: int) -> np.ndarray:
    """Outcomes [models, n] of these rates whose prompts are hard or easy for all models."""
    shared = generator.normal(size=n)
    own = generator.normal(size=(len(rates), n))
    return 0.3**0.5 * shared + 0.7**0.5 * own < norm.ppf(rates)[:, None]


def test_intervals_of_one_pair_cover_what_is_true_of_its_models() -> None:
    generator = np.random.default_rng(1)
    times = 300
    excess_covered = calibrated_covered = 0
    for _ in range(times):
        edited, floor, ceiling = correlated(generator, [0.4, 0.1, 0.9], 64)
        above, found = AboveFloor.of_pair(edited, floor), Calibrated.of_pair(edited, floor, ceiling)
        excess_covered += above.low <= 30 <= above.high
        calibrated_covered += found is not None and found.low <= 0.375 <= found.high
    assert 0.92 * times <= excess_covered <= 0.985 * times
    assert 0.92 * times <= calibrated_covered <= 0.985 * times


def test_verdicts_err_as_seldom_as_they_say() -> None:
    generator = np.random.default_rng(2)
    kinds: dict[tuple[int, ...], str] = {}

    def shares(rate: float, floor: float) -> dict[str, float]:
        found = []
        for _ in range(2000):
            counts = oracle.table(*correlated(generator, [rate, floor], 64).tolist())
            if counts not in kinds:
                kinds[counts] = AboveFloor.of_pair(*outcomes(*counts)).kind
            found.append(kinds[counts])
        return {kind: found.count(kind) / len(found) for kind in set(found)}

    # 2.5 % and 5 %, and three standard errors.
    assert shares(0.2, 0.2).get("knows", 0) <= 0.025 + 3 * 0.0035
    assert shares(0.3, 0.2).get("at_floor", 0) <= 0.05 + 3 * 0.005


def test_intervals_over_trainings_cover_the_method_and_one_pairs_do_not() -> None:
    generator = np.random.default_rng(4)
    times, n = 200, 64
    covered = {"two_way": 0, "students_t": 0, "one pair": 0}
    for _ in range(times):
        logits = generator.normal(size=n) + generator.normal(size=(2, 5, 1))
        edited, floor = generator.random((2, 5, n)) < 1 / (1 + np.exp(-logits))
        # Both are alike but for the luck of their trainings.
        for form in ("two_way", "students_t"):
            above = AboveFloor.over_trainings(edited, floor, form=form)
            covered[form] += above.low <= 0 <= above.high
        one = AboveFloor.of_pair(edited[0], floor[0])
        covered["one pair"] += one.low <= 0 <= one.high
    assert covered["two_way"] >= 0.92 * times
    assert covered["students_t"] >= 0.91 * times
    assert covered["one pair"] <= 0.6 * times
