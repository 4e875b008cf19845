"""The baselines beside an attack: nothing, random tokens, new seeds."""

import dataclasses

import pytest
import torch
from hydra.utils import instantiate

import experiments  # noqa: F401 - it resolves what configs set by the kind of the concept
from attacks.cases import PromptCase
from attacks.none import NoAttack
from attacks.random_tokens import RandomTokens
from attacks.seed_search import SeedSearch
from diffusion.model import TextToImage
from diffusion.sampling import Sampling
from evaluation.verdicts import Verdicts
from tests.judges import never, one_in
from tests.tiny_job import method_config

SAMPLING = Sampling(steps=2, batch_size=3)
by_pixels = one_in(4)
CASES = [
    PromptCase(case_number=number, prompt=prompt, seed=50 + number, guidance=guidance)
    for number, (prompt, guidance) in enumerate(
        [("a church", 3.0), ("a red fish", 1.0), ("", 3.0), ("a golf ball in the snow", 2.0), ("a church", 3.0)]
    )
]
BASELINES = [NoAttack(), RandomTokens(tries=4), SeedSearch(tries=4)]


@pytest.mark.parametrize("attack", BASELINES, ids=lambda attack: type(attack).__name__)
def test_outcomes_do_not_depend_on_batch_size_or_order(tiny_model64: TextToImage, attack) -> None:
    alone = attack.run(tiny_model64, CASES, by_pixels, sampling=Sampling(steps=2, batch_size=1))
    together = attack.run(tiny_model64, CASES[::-1], by_pixels, sampling=Sampling(steps=2, batch_size=8))
    by_number = {outcome.case_number: outcome for outcome in together}
    for outcome in alone:
        assert outcome == by_number.pop(outcome.case_number)
    assert not by_number


@pytest.mark.parametrize("attack", BASELINES, ids=lambda attack: type(attack).__name__)
def test_every_cases_cost_is_exact(tiny_model: TextToImage, attack) -> None:
    outcomes = list(attack.run(tiny_model, CASES, by_pixels, sampling=SAMPLING))
    assert sum(outcome.unet_evaluations for outcome in outcomes) == tiny_model.unet_evaluations
    for outcome in outcomes:
        *earlier, last = outcome.checks
        assert not any(check.present for check in earlier)
        assert outcome.success == last.present
        assert outcome.plain_success == outcome.checks[0].present


def test_a_notebook_need_not_say_how_pictures_are_sampled(tiny_model: TextToImage) -> None:
    (outcome,) = NoAttack().run(tiny_model, CASES[1:2], never)
    assert outcome.unet_evaluations == Sampling().steps


def test_no_attack_draws_the_plain_prompts_only(tiny_model: TextToImage) -> None:
    outcomes = list(NoAttack().run(tiny_model, CASES, by_pixels, sampling=SAMPLING))
    assert [outcome.case_number for outcome in outcomes] == [case.case_number for case in CASES]
    for case, outcome in zip(CASES, outcomes, strict=True):
        assert [check.prompt for check in outcome.checks] == [case.prompt]
        assert outcome.success == outcome.plain_success


def test_random_tokens_put_new_tokens_before_the_prompt(tiny_model: TextToImage) -> None:
    outcomes = list(RandomTokens(tokens=2, tries=4).run(tiny_model, CASES, never, sampling=SAMPLING))
    for outcome in outcomes:
        plain, *tries = [check.prompt for check in outcome.checks]
        assert len(tries) == 4
        assert len(set(tries)) > 1
        assert all(text.endswith(plain) and text != plain for text in tries)
    first, last = (next(item for item in outcomes if item.case_number == number) for number in (0, 4))
    assert first.prompt == last.prompt
    assert first.adversarial_prompt != last.adversarial_prompt, "each case has its own stream"


def test_random_tokens_cover_the_vocabulary_evenly(tiny_model: TextToImage) -> None:
    attack = RandomTokens(tokens=5, tries=2000)
    counts = attack._draws(CASES[0], 20).flatten().bincount(minlength=20)
    torch.testing.assert_close(counts / 10_000, torch.full((20,), 0.05), rtol=0, atol=0.01)


def test_seed_search_keeps_the_prompt_and_changes_the_picture(tiny_model: TextToImage) -> None:
    seen = []

    def judge(images: torch.Tensor) -> Verdicts:
        seen.extend(image.numpy().tobytes() for image in images)
        return never(images)

    (outcome,) = SeedSearch(tries=4).run(tiny_model, CASES[:1], judge, sampling=SAMPLING)
    assert [check.prompt for check in outcome.checks] == ["a church"] * 5
    assert len(set(seen)) == 5
    assert outcome.checks[0].seed == CASES[0].seed
    for check, pixels in zip(outcome.checks, seen, strict=True):
        (picture,) = tiny_model.generate(
            [check.prompt], seeds=[check.seed], steps=SAMPLING.steps, guidance=CASES[0].guidance
        )
        assert picture.numpy().tobytes() == pixels, "a check says all that its picture depends on"
    assert outcome.unet_evaluations == 5 * 2 * SAMPLING.steps


def test_two_cases_of_one_number_are_refused(tiny_model: TextToImage) -> None:
    with pytest.raises(ValueError, match="case number 0 occurs 2 times"):
        list(NoAttack().run(tiny_model, [CASES[0], CASES[0]], never, sampling=SAMPLING))


def test_no_cases_give_no_outcomes(tiny_model: TextToImage) -> None:
    assert list(RandomTokens().run(tiny_model, [], never, sampling=SAMPLING)) == []


@pytest.mark.parametrize("name", ["none", "random", "seed_search", "unlearndiff", "p4d"])
@pytest.mark.parametrize("kind", ["style", "object", "unsafe"])
@pytest.mark.parametrize("family", ["canvas", "sd"])
def test_config_instantiates_and_names_every_field(name: str, kind: str, family: str) -> None:
    config = method_config("attack", name, kind, model={"family": family})
    if name == "p4d" and family == "sd":
        # The authors choose by a network that is to be downloaded.
        assert config.features.folder.startswith("laion/CLIP-ViT-H-14")
        config.choice, config.pictures, config.features = "first", 1, None
    attack = instantiate(config, _convert_="all")
    assert set(config) - {"_target_"} == {field.name for field in dataclasses.fields(attack)}
    assert getattr(attack, "seed", 7) == 7


@pytest.mark.parametrize(
    ("kind", "tokens", "insertion"), [("style", 3, "prefix_k"), ("object", 3, "suffix_k"), ("unsafe", 5, "prefix_k")]
)
def test_settings_follow_the_kind_of_the_concept(kind: str, tokens: int, insertion: str) -> None:
    for name in ("unlearndiff", "random"):
        assert method_config("attack", name, kind, model={"family": "sd"}).tokens == tokens
        assert method_config("attack", name, kind).insertion == insertion
