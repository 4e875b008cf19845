"""PEZ and GCG against slow second implementations, their cost, and what batches may not change."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from attacks.cases import Outcome, PromptCase
from attacks.gcg import GCG, substitute
from attacks.pez import PEZ
from attacks.prompt_search import candidate_tokens
from diffusion.model import TextToImage
from diffusion.sampling import Sampling
from diffusion.streams import stream
from evaluation.verdicts import Judge
from tests.attack_cases import make_cases
from tests.judges import never, one_in
from tests.oracles import gcg, pez

PROMPTS = ["a red church in the snow", "", "a painting of a church, " * 12, "two blue fish"]
SAMPLING = Sampling(steps=2, batch_size=4)
by_pixels = one_in(4)
TIMESTEPS, STEPS = 2, 2

Attack = type[PEZ] | type[GCG]
both = pytest.mark.parametrize("attack", [PEZ, GCG])
FIELDS: dict[Attack, dict[str, Any]] = {
    PEZ: {"learning_rate": 0.05},
    GCG: {"top_k": 9, "substitutions": 5, "draws": 2, "forward_batch_size": 7},
}


def run(
    attack: Attack, model: TextToImage, cases: Sequence[PromptCase], judge: Judge = never, **fields: Any
) -> dict[int, Outcome]:
    """Outcomes by case number."""
    settings = {"tokens": 3, "timesteps": TIMESTEPS, "steps_per_timestep": STEPS, **FIELDS[attack], **fields}
    outcomes = list(attack(**settings).run(model, cases, judge, sampling=SAMPLING))
    assert len(outcomes) == len(cases)
    return {outcome.case_number: outcome for outcome in outcomes}


@pytest.mark.parametrize(("where", "schedule"), [("prefix_k", "even"), ("insert_k", "sampled")])
def test_pez_agrees_with_the_slow_implementation(tiny_model64: TextToImage, where: str, schedule: str) -> None:
    model = tiny_model64
    cases = make_cases(model, PROMPTS[::2])
    outcomes = run(PEZ, model, cases, insertion=where, schedule=schedule, weight_decay=0.3)
    for case in cases:
        blocks = pez.attack(
            model,
            case.prompt,
            model.encode_images(case.target[None])[0],
            stream(0, "pez/search", case.case_number),
            count=3,
            where=where,
            timesteps=[250, 750] if schedule == "even" else [None, None],
            steps=STEPS,
            rate=0.05,
            decay=0.3,
        )
        for check, (text, loss) in zip(outcomes[case.case_number].checks[1:], blocks, strict=True):
            assert check.prompt == text
            assert check.loss == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize(
    ("where", "schedule", "keep_best"), [("prefix_k", "even", False), ("insert_k", "sampled", True)]
)
def test_gcg_agrees_with_the_slow_implementation(
    tiny_model64: TextToImage, where: str, schedule: str, keep_best: bool
) -> None:
    model = tiny_model64
    cases = make_cases(model, PROMPTS[::2])
    outcomes = run(GCG, model, cases, insertion=where, schedule=schedule, keep_best=keep_best)
    for case in cases:
        blocks = gcg.attack(
            model,
            case.prompt,
            model.encode_images(case.target[None])[0],
            stream(0, "gcg/search", case.case_number),
            count=3,
            where=where,
            timesteps=[250, 750] if schedule == "even" else [None, None],
            steps=STEPS,
            top_k=9,
            substitutions=5,
            draws=2,
            keep_best=keep_best,
        )
        for check, (text, loss) in zip(outcomes[case.case_number].checks[1:], blocks, strict=True):
            assert check.prompt == text
            assert check.loss == pytest.approx(loss, rel=1e-6)


def test_a_substitution_changes_one_token_to_a_promising_one() -> None:
    tokens = torch.tensor([[1, 2], [3, 4]])
    promising = torch.tensor([[[10, 11], [20, 21]], [[30, 31], [40, 41]]])
    texts = substitute(tokens, promising, torch.tensor([[0, 1, 1], [1, 0, 0]]), torch.tensor([[0, 0, 1], [1, 1, 0]]))
    assert texts.tolist() == [[[10, 2], [1, 20], [1, 21]], [[3, 41], [31, 4], [30, 4]]]


def test_only_with_keep_best_gcg_stays_where_no_substitution_is_better(tiny_model64: TextToImage) -> None:
    cases = make_cases(tiny_model64, PROMPTS)
    settings = {"substitutions": 1, "steps_per_timestep": 1, "timesteps": 4}
    distinct = {
        keep_best: sum(
            len({check.prompt for check in outcome.checks})
            for outcome in run(GCG, tiny_model64, cases, keep_best=keep_best, **settings).values()
        )
        for keep_best in (True, False)
    }
    assert distinct[True] < distinct[False]


def test_gcg_may_start_from_a_given_token(tiny_model64: TextToImage) -> None:
    word = tiny_model64.tokenizer.decode(candidate_tokens(tiny_model64, readable=True)[-1:]).strip()
    outcomes = run(
        GCG, tiny_model64, make_cases(tiny_model64, [""]), initial_token=word, readable=True, steps_per_timestep=1
    )
    assert outcomes[10].checks[1].prompt.split().count(word) == 2


@both
def test_outcomes_do_not_depend_on_batch_size_or_order(attack: Attack, tiny_model64: TextToImage) -> None:
    cases = make_cases(tiny_model64, [*PROMPTS, "a church"])
    alone = run(attack, tiny_model64, cases, by_pixels, schedule="sampled", batch_size=1)
    assert len({len(outcome.checks) for outcome in alone.values()}) > 1
    other_size = {"forward_batch_size": 64} if attack is GCG else {}
    for other in (
        run(attack, tiny_model64, cases, by_pixels, schedule="sampled", batch_size=5, **other_size),
        run(attack, tiny_model64, cases[::-1], by_pixels, schedule="sampled", batch_size=2),
    ):
        for number, outcome in alone.items():
            assert dataclasses.replace(other[number], checks=()) == dataclasses.replace(outcome, checks=())
            assert torch.equal(other[number].image, outcome.image)
            for ours, theirs in zip(other[number].checks, outcome.checks, strict=True):
                assert dataclasses.replace(ours, loss=None) == dataclasses.replace(theirs, loss=None)
                assert ours.loss is theirs.loss is None or ours.loss == pytest.approx(theirs.loss, rel=1e-9)


@both
def test_every_cases_cost_is_exact(attack: Attack, tiny_model: TextToImage) -> None:
    outcomes = run(attack, tiny_model, make_cases(tiny_model, PROMPTS), by_pixels, batch_size=3)
    assert sum(outcome.unet_evaluations for outcome in outcomes.values()) == tiny_model.unet_evaluations
    step = {PEZ: 1, GCG: 2 * (1 + 5)}[attack]
    for outcome in outcomes.values():
        pictures = len({check.prompt for check in outcome.checks})
        spent = STEPS * step * (len(outcome.checks) - 1) + 2 * SAMPLING.steps * pictures
        assert outcome.unet_evaluations == outcome.checks[-1].unet_evaluations == spent


@both
def test_the_adversarial_prompt_is_text_that_draws_the_judged_picture(
    attack: Attack, tiny_model64: TextToImage
) -> None:
    cases = make_cases(tiny_model64, PROMPTS)
    outcomes = run(attack, tiny_model64, cases)
    for case in cases:
        outcome = outcomes[case.case_number]
        assert len({check.prompt for check in outcome.checks}) > 1
        again = tiny_model64.generate([outcome.adversarial_prompt], seeds=[case.seed], steps=2, guidance=case.guidance)
        assert torch.equal(again[0], outcome.image)


@both
def test_readable_searches_find_tokens_that_are_read_back(attack: Attack, tiny_model: TextToImage) -> None:
    cases = make_cases(tiny_model, [""])
    for check in run(attack, tiny_model, cases, readable=True, criterion="l1")[10].checks[1:]:
        assert len(tiny_model.tokenizer(check.prompt, add_special_tokens=False).input_ids) == 3


@both
def test_nothing_but_the_inserted_embeddings_receives_a_gradient(attack: Attack, tiny_model: TextToImage) -> None:
    run(attack, tiny_model, make_cases(tiny_model, PROMPTS[:1]))
    for part in (tiny_model.network, tiny_model.text_encoder, tiny_model.vae):
        assert all(parameter.grad is None for parameter in part.parameters())


@both
def test_what_cannot_be_done_is_refused_before_anything_is_spent(attack: Attack, tiny_model: TextToImage) -> None:
    case = dataclasses.replace(make_cases(tiny_model, PROMPTS)[0], target=None)
    for fields, cases, sentence in [
        ({}, [case], "case 10 has no target picture"),
        ({"tokens": 30}, [], "30 tokens cannot be inserted"),
        ({"timesteps": 1001}, [], "timesteps is 1001"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            run(attack, tiny_model, cases, **fields)
    assert tiny_model.unet_evaluations == 0


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"top_k": 1000}, "top_k is 1000; there are"),
        ({"initial_token": "a church"}, "initial_token is 'a church'"),
        ({"initial_token": "<|endoftext|>"}, "initial_token is '<.endoftext.>'"),
    ],
)
def test_gcg_refuses_what_the_vocabulary_does_not_have(tiny_model: TextToImage, fields: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        run(GCG, tiny_model, [], **fields)


@both
@pytest.mark.parametrize(
    "field", [{"tokens": 0}, {"insertion": "infix"}, {"steps_per_timestep": 0}, {"schedule": "odd"}, {"restart": 1}]
)
def test_fields_out_of_range_are_refused(attack: Attack, field: dict) -> None:
    with pytest.raises(ValidationError):
        attack(**field)
