import dataclasses
import json

import numpy as np
import pytest
import torch

from evaluation.statistics import (
    Mean,
    PairedComparison,
    Rate,
    effective_number,
    mcnemar_p_value,
    sign_flip_p_value,
    wilson_interval,
)
from tests.oracles import statistics as oracle


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 64), (24, 64), (64, 64), (999, 1000)])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_wilson_interval_follows_the_formula(successes: int, n: int, confidence: float):
    expected = oracle.wilson(successes, n, confidence)
    assert wilson_interval(successes, n, confidence) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 4), (5, 4)])
def test_wilson_interval_refuses_impossible_counts(successes: int, n: int):
    with pytest.raises(ValueError, match=f"{successes} successes of {n} cases"):
        wilson_interval(successes, n)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (0, 6), (3, 3), (10, 2), (17, 30)])
def test_mcnemar_sums_the_binomial_tails(b: int, c: int):
    assert mcnemar_p_value(b, c) == pytest.approx(oracle.exact_mcnemar(b, c), abs=1e-12)
    assert mcnemar_p_value(b, c) == mcnemar_p_value(c, b)


@pytest.mark.parametrize("make", [list, np.array, torch.tensor])
def test_a_rate_counts_booleans_of_any_container(make):
    rate = Rate.of(make([True] * 24 + [False] * 40))
    assert (rate.successes, rate.n, rate.rate) == (24, 64, 0.375)
    assert str(rate) == "37.5 % [26.7, 49.7] (24/64)"


def test_a_rate_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one case"):
        Rate.of([])


def test_what_is_stored_is_plain_json():
    values = [Rate.of([True]), Mean.of(torch.tensor([1.0, 2.0])), PairedComparison.of([True, False], [False, False])]
    for value in values:
        assert type(value)(**json.loads(json.dumps(value.as_dict()))) == value
        assert dataclasses.is_dataclass(value)


def test_mean_has_students_interval():
    # t(0.975, 3) = 3.182446; the standard error of 1, 2, 3, 6 is sqrt(14 / 3 / 4).
    mean = Mean.of([1.0, 2.0, 3.0, 6.0])
    margin = 3.182446305284263 * (14 / 3 / 4) ** 0.5
    assert (mean.n, mean.mean) == (4, 3.0)
    assert (mean.low, mean.high) == pytest.approx((3 - margin, 3 + margin), abs=1e-9)
    assert Mean.of([5.0]) == Mean(1, 5.0, 5.0, 5.0)
    with pytest.raises(ValueError, match="no values"):
        Mean.of([])


def test_the_mean_of_grouped_values_has_the_interval_of_its_groups():
    # Copies of a value are one value, and values of which none shares a group are themselves.
    four = Mean.of([1.0, 2.0, 3.0, 6.0])
    copies = Mean.of([1.0, 2.0, 3.0, 6.0] * 3, "abcd" * 3)
    assert (copies.mean, copies.low, copies.high) == pytest.approx((four.mean, four.low, four.high))
    assert (copies.n, copies.groups, str(copies)) == (12, 4, "3.00 [-0.44, 6.44] (n = 12, 4 distinct)")
    assert Mean.of([1.0, 2.0, 3.0, 6.0], "abcd") == four
    # Among groups of unequal sizes the variance of the mean is G / (G - 1) times the summed squares of the groups'
    # deviations, by n squared.
    values, groups = [0.0, 0.5, 4.0, 5.0, 6.0, 9.0], "aabbbc"
    mean = sum(values) / 6
    sums = [sum(value - mean for value, of in zip(values, groups, strict=True) if of == group) for group in "abc"]
    margin = 4.302653 * (3 / 2 * sum(one**2 for one in sums) / 6**2) ** 0.5
    grouped = Mean.of(values, groups)
    assert (grouped.low, grouped.high) == pytest.approx((mean - margin, mean + margin), abs=1e-5)
    one = Mean.of([1.0, 2.0], "aa")
    assert (one.low, one.high, one.groups) == (1.5, 1.5, 1)


@pytest.mark.parametrize(
    ("both", "only_first", "only_second", "neither"),
    [(20, 30, 4, 10), (0, 10, 20, 0), (10, 0, 0, 54), (64, 0, 0, 0), (3, 2, 2, 1), (1, 20, 20, 1), (40, 12, 0, 12)],
)
def test_paired_comparison_follows_newcombe(both: int, only_first: int, only_second: int, neither: int):
    first = [True] * both + [True] * only_first + [False] * only_second + [False] * neither
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    comparison = PairedComparison.of(first, second)
    n = len(first)
    low, high = oracle.newcombe_paired(both, only_first, only_second, neither)
    assert comparison.n == n
    assert (comparison.only_first, comparison.only_second) == (only_first, only_second)
    assert comparison.difference == pytest.approx(100 * (sum(first) - sum(second)) / n)
    assert (comparison.low, comparison.high) == pytest.approx((100 * low, 100 * high), abs=1e-9)
    assert comparison.low <= comparison.difference <= comparison.high
    assert comparison.p_value == pytest.approx(oracle.exact_mcnemar(only_first, only_second))

    swapped = PairedComparison.of(second, first)
    assert (swapped.low, swapped.high) == pytest.approx((-comparison.high, -comparison.low))


def test_unequal_numbers_of_outcomes_are_not_pairs():
    with pytest.raises(ValueError, match="2 and 1 outcomes"):
        PairedComparison.of([True, False], [True])


@pytest.mark.parametrize("times", [1, 2, 30])
def test_rows_that_repeat_each_other_tell_no_more_than_one_of_them(times: int):
    first, second = [True] * 7 + [False] * 5, [True] * 3 + [False] * 9
    prompts = [f"prompt {number}" for number in range(12)] * times
    once, often = Rate.of(first), Rate.of(first * times, prompts)
    assert (often.low, often.high) == pytest.approx((once.low, once.high))
    assert (often.n, often.groups) == (12 * times, None if times == 1 else 12)
    one, many = PairedComparison.of(first, second), PairedComparison.of(first * times, second * times, prompts)
    assert (many.low, many.high, many.p_value) == pytest.approx((one.low, one.high, one.p_value))
    assert many.difference == pytest.approx(one.difference)


@pytest.mark.parametrize("outcome", [True, False])
def test_one_prompt_thirty_times_is_one_prompt(outcome: bool):
    rate, alone = Rate.of([outcome] * 30, ["a church"] * 30), Rate.of([outcome])
    assert (rate.low, rate.high) == pytest.approx((alone.low, alone.high))
    assert str(rate).endswith("/30, 1 distinct)")
    mixed = Rate.of([outcome] * 29 + [not outcome], ["a church"] * 30)
    assert mixed.groups == 1
    assert mixed.as_dict()["groups"] == 1


def test_the_effective_number_is_that_of_the_design_effect():
    # Two seeds of each of 4 prompts: y = 2, 1, 0, 1 of 2; p = 1/2.
    values = [1, 1, 1, 0, 0, 0, 0, 1]
    groups = list("aabbccdd")
    among, alone = (1 + 0 + 1 + 0) / 64, 0.25 / 8
    assert effective_number(values, groups) == pytest.approx(8 * alone / among)
    # Groups that are more alike than chance would have it count as what they are, not as more.
    assert effective_number([1, 0] * 4, groups) == 8
    # Without variance: n squared over the squared sizes.
    assert effective_number([1] * 8, list("aaaaaabc")) == pytest.approx(64 / 38)


def test_outcomes_of_independent_prompts_are_as_without_groups():
    outcomes = [True, False, True, True]
    assert Rate.of(outcomes, list("abcd")) == Rate.of(outcomes)
    other = [False, False, True, False]
    assert PairedComparison.of(outcomes, other, list("abcd")) == PairedComparison.of(outcomes, other)
    with pytest.raises(ValueError, match="4 outcomes and 3 groups"):
        Rate.of(outcomes, list("abc"))


def test_intervals_of_grouped_cases_cover_the_rate():
    generator = np.random.default_rng(0)
    covered = {"grouped": 0, "as if independent": 0}
    for _ in range(400):
        rates = generator.beta(1, 1, size=40)
        outcomes = (generator.random((40, 10)) < rates[:, None]).ravel().tolist()
        groups = np.repeat(np.arange(40), 10).tolist()
        for name, rate in (("grouped", Rate.of(outcomes, groups)), ("as if independent", Rate.of(outcomes))):
            covered[name] += rate.low <= 0.5 <= rate.high
    assert covered["grouped"] > 0.92 * 400
    assert covered["as if independent"] < 0.85 * 400


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (0, 6), (3, 3), (10, 2)])
def test_flipping_signs_of_single_cases_is_mcnemars_test(b: int, c: int):
    assert sign_flip_p_value([1] * b + [-1] * c + [0] * 5) == pytest.approx(mcnemar_p_value(b, c))


def test_flipping_signs_counts_every_assignment():
    # |+-3 +-1| >= 4 in 2 of 4 ways, >= 2 in all.
    assert sign_flip_p_value([3, 1]) == pytest.approx(0.5)
    assert sign_flip_p_value([3, -1]) == pytest.approx(1.0)
