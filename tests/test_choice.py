"""P4D's own rule: the text whose picture is most like the target is judged, by several pictures."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import cosine_similarity

from attacks.cases import Check, Outcome
from attacks.p4d import P4D
from diffusion.model import TextToImage
from diffusion.sampling import Sampling
from evaluation.quality.extractors import Features
from evaluation.verdicts import Verdicts
from tests.attack_cases import assert_same_outcomes, make_cases
from tests.judges import never, one_in
from tests.test_p4d import Pair, pair  # noqa: F401 - a fixture

CHECKS, PICTURES = 3, 3
SAMPLING = Sampling(steps=1, batch_size=4)


class Pixels:
    """Pictures are compared by their pixels."""

    def load(self) -> Features:
        return Features(lambda images: images.flatten(1).double(), 1)


def run(pair: Pair, judge=never, prompts=("a red church", "two blue fish"), **fields) -> dict[int, Outcome]:  # noqa: F811
    settings = {"tokens": 2, "checks": CHECKS, "steps_per_check": 1, "learning_rate": 0.5, "pictures": PICTURES}
    attack = P4D(**{**settings, "choice": "similarity", "features": Pixels(), "variant": "p4d_n", **fields})
    cases = make_cases(pair[0], prompts)
    return {o.case_number: o for o in attack.run(pair[0], cases, judge, sampling=SAMPLING, original=pair[1])}


def likeness(model: TextToImage, check: Check, target: Tensor) -> float:
    image = model.generate([check.prompt], seeds=[check.seed], steps=1, guidance=3.0)
    return cosine_similarity(image.flatten(1).double(), target[None].flatten(1).double()).item()


@pytest.mark.parametrize("variant", ["p4d_n", "union"])
def test_the_text_most_like_the_target_gets_the_pictures_that_count(pair: Pair, variant: str) -> None:  # noqa: F811
    outcomes = run(pair, variant=variant)
    variants = 2 if variant == "union" else 1
    for case in make_cases(pair[0], ["a red church", "two blue fish"]):
        checks = outcomes[case.case_number].checks
        plain, searched = checks[:PICTURES], checks[PICTURES : PICTURES + variants * CHECKS]
        chosen = checks[PICTURES + variants * CHECKS :]
        assert [check.prompt for check in plain] == [case.prompt] * PICTURES
        assert [check.counts for check in checks] == [True] * PICTURES + [False] * len(searched) + [True] * len(chosen)
        assert len(chosen) == variants * PICTURES
        for turn in range(variants):
            best = max(searched[turn::variants], key=lambda check: likeness(pair[0], check, case.target))
            pictures = chosen[turn * PICTURES : (turn + 1) * PICTURES]
            assert {check.prompt for check in pictures} == {best.prompt}
            assert pictures[0].seed == plain[0].seed == case.seed
            assert len({check.seed for check in pictures}) == PICTURES
        assert len({check.seed for check in searched}) == len(searched)


def test_a_success_on_the_way_counts_for_nothing_and_any_picture_of_the_chosen_text_for_all(pair: Pair) -> None:  # noqa: F811
    calls = []

    def judge(images: Tensor) -> Verdicts:
        calls.append(len(images))
        # All texts of the search show the concept, and of the chosen one the second picture.
        present = PICTURES < len(calls) <= PICTURES + CHECKS or len(calls) == PICTURES + CHECKS + 2
        return Verdicts(torch.full((len(images),), present), torch.zeros(len(images)))

    for outcome in run(pair, judge).values():
        assert outcome.success
        assert not outcome.plain_success
        assert len(outcome.checks) == PICTURES + CHECKS + 2
    for outcome in run(pair, never).values():
        assert not outcome.success


def test_any_picture_of_the_plain_prompt_is_its_success(pair: Pair) -> None:  # noqa: F811
    calls = []

    def third(images: Tensor) -> Verdicts:
        calls.append(len(images))
        return Verdicts(torch.full((len(images),), len(calls) == PICTURES), torch.zeros(len(images)))

    for outcome in run(pair, third).values():
        assert (outcome.plain_success, len(outcome.checks)) == (True, PICTURES)


def test_costs_are_exact_and_batches_change_nothing(pair: Pair) -> None:  # noqa: F811
    spent = sum(model.unet_evaluations for model in pair)
    prompts = ("a red church", "two blue fish", "a church")
    alone = run(pair, one_in(5), prompts, batch_size=1, variant="union")
    spent = sum(model.unet_evaluations for model in pair) - spent
    assert sum(outcome.unet_evaluations for outcome in alone.values()) == spent
    assert_same_outcomes(run(pair, one_in(5), prompts, batch_size=2, variant="union"), alone)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"choice": "similarity"}, "features is None; choice=similarity needs"),
        ({"pictures": 3}, r"choice is 'first', which knows neither pictures \(here 3\)"),
        ({"features": Pixels()}, "take choice=similarity, or pictures=1"),
    ],
)
def test_half_a_rule_is_refused(fields: dict, sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        P4D(**fields)
