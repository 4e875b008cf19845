"""P4D against a slow second implementation, the union of its variants, its cost, and what batches may not change."""

import dataclasses
from collections.abc import Sequence
from typing import get_args

import pytest
import torch
from pydantic import ValidationError

from attacks.cases import Outcome, PromptCase
from attacks.p4d import P4D, Variant
from attacks.prompt_search import adam_step, nearest_tokens
from diffusion.model import TextToImage
from diffusion.sampling import Sampling
from diffusion.streams import stream
from erasure.edit import Edit
from erasure.parameters import scope_parameters
from tests.attack_cases import make_cases
from tests.judges import never, one_in
from tests.oracles.p4d import attack, nearest

PROMPTS = ["a red church in the snow", "", "a painting of a church, " * 12, "two blue fish", "a church"]
SAMPLING = Sampling(steps=2, batch_size=4)
by_pixels = one_in(4)
CHECKS, STEPS = 2, 2

Pair = tuple[TextToImage, TextToImage]
"""The edited and the unedited model."""


@pytest.fixture
def pair(tiny_model64: TextToImage) -> Pair:
    generator = torch.Generator().manual_seed(9)
    before = scope_parameters(tiny_model64, "xattn")
    after = {name: value + 0.3 * torch.randn(value.shape, generator=generator) for name, value in before.items()}
    edit = Edit.from_weights(before, after)
    edit.apply(tiny_model64)
    return tiny_model64, edit.unedited(tiny_model64)


def run(pair: Pair, cases: Sequence[PromptCase], judge=never, **fields) -> dict[int, Outcome]:
    """Outcomes by case number."""
    settings = {"tokens": 3, "checks": CHECKS, "steps_per_check": STEPS, "learning_rate": 0.05, **fields}
    outcomes = list(P4D(**settings).run(pair[0], cases, judge, sampling=SAMPLING, original=pair[1]))
    assert len(outcomes) == len(cases)
    return {outcome.case_number: outcome for outcome in outcomes}


@pytest.mark.parametrize(
    ("variant", "count", "schedule", "optimizer"),
    [
        ("p4d_n", 3, "sampled", "adamw"),
        ("p4d_k", 6, "sampled", "adamw"),
        ("insert", 3, "even", "adam"),
    ],
)
def test_search_agrees_with_the_slow_implementation(
    pair: Pair, variant: str, count: int, schedule: str, optimizer: str
) -> None:
    cases = make_cases(pair[0], PROMPTS)[:3]
    outcomes = run(pair, cases, variant=variant, schedule=schedule, optimizer=optimizer, weight_decay=0.3)
    for case in cases:
        blocks = attack(
            *pair,
            case.prompt,
            pair[1].encode_images(case.target[None])[0],
            stream(0, "p4d/start", case.case_number, get_args(Variant).index(variant)),
            stream(0, "p4d/search", case.case_number),
            variant=variant,
            count=count,
            every=3,
            checks=CHECKS,
            steps=STEPS,
            timesteps=[250, 750] if schedule == "even" else None,
            optimizer={"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[optimizer],
            rate=0.05,
            decay=0.3,
        )
        plain, *checks = outcomes[case.case_number].checks
        assert plain.prompt == case.prompt
        for check, (text, loss) in zip(checks, blocks, strict=True):
            assert check.prompt == text
            assert check.loss == pytest.approx(loss, rel=1e-6)


def test_the_search_changes_the_tokens(pair: Pair) -> None:
    outcome = run(pair, make_cases(pair[0], PROMPTS)[:1], variant="p4d_n")[10]
    assert len({check.prompt for check in outcome.checks}) == 1 + CHECKS


def test_projection_agrees_with_a_loop_and_ignores_length(tiny_model64: TextToImage) -> None:
    vocabulary = tiny_model64.vocabulary
    points = torch.randn(2, 3, vocabulary.shape[1], generator=torch.Generator().manual_seed(0)).double()
    directions = torch.nn.functional.normalize(vocabulary, dim=-1)
    expected = [[nearest(row, vocabulary, list(range(len(vocabulary)))) for row in rows] for rows in points]
    assert nearest_tokens(points, directions).tolist() == expected
    assert nearest_tokens(100 * points, directions).tolist() == expected
    some = torch.tensor([[5, 77, 130]])
    assert torch.equal(nearest_tokens(vocabulary[some], directions), some)


@pytest.mark.parametrize(("decoupled", "reference"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)])
def test_both_optimisers_are_torchs(decoupled: bool, reference: type[torch.optim.Optimizer]) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.rand(2, 3, 4, generator=generator, dtype=torch.float64)
    slow = torch.nn.Parameter(rows.clone())
    optimizer = reference([slow], lr=0.1, weight_decay=0.2)
    mean, variance = torch.zeros_like(rows), torch.zeros_like(rows)
    for step in range(1, 6):
        slow.grad = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
        adam_step(
            rows,
            slow.grad,
            mean,
            variance,
            steps=torch.tensor([step, step]),
            learning_rate=0.1,
            weight_decay=0.2,
            decoupled=decoupled,
        )
    torch.testing.assert_close(rows, slow.data, rtol=1e-12, atol=0)


def test_a_union_goes_as_both_variants_alone_and_shares_their_references(pair: Pair) -> None:
    cases = make_cases(pair[0], PROMPTS)[:2]
    alone = [run(pair, cases, variant=variant) for variant in ("p4d_n", "p4d_k")]
    union = run(pair, cases, variant="union")
    for number, outcome in union.items():
        texts = [[(check.prompt, check.loss) for check in outcomes[number].checks[1:]] for outcomes in alone]
        turns = [pair_of_checks for checks in zip(*texts, strict=True) for pair_of_checks in checks]
        for check, (text, loss) in zip(outcome.checks[1:], turns, strict=True):
            assert check.prompt == text
            assert check.loss == pytest.approx(loss, rel=1e-9)
        spent = [check.unet_evaluations for check in outcome.checks]
        picture = 2 * SAMPLING.steps
        assert spent[1] - spent[0] == 2 * STEPS + picture
        assert spent[2] - spent[1] == STEPS + picture


@pytest.mark.parametrize("variant", ["p4d_n", "union"])
def test_every_cases_cost_is_exact(pair: Pair, variant: str) -> None:
    outcomes = run(pair, make_cases(pair[0], PROMPTS), by_pixels, variant=variant, batch_size=3)
    assert len({len(outcome.checks) for outcome in outcomes.values()}) > 1
    spent = sum(model.unet_evaluations for model in pair)
    assert sum(outcome.unet_evaluations for outcome in outcomes.values()) == spent


def test_outcomes_do_not_depend_on_batch_size_or_order(pair: Pair) -> None:
    cases = make_cases(pair[0], PROMPTS)
    alone = run(pair, cases, by_pixels, batch_size=1)
    for other in (run(pair, cases, by_pixels, batch_size=5), run(pair, cases[::-1], by_pixels, batch_size=2)):
        for number, outcome in alone.items():
            assert dataclasses.replace(other[number], checks=()) == dataclasses.replace(outcome, checks=())
            assert torch.equal(other[number].image, outcome.image)
            for ours, theirs in zip(other[number].checks, outcome.checks, strict=True):
                assert dataclasses.replace(ours, loss=None) == dataclasses.replace(theirs, loss=None)
                assert ours.loss is theirs.loss is None or ours.loss == pytest.approx(theirs.loss, rel=1e-9)


def test_an_interrupted_run_goes_on_with_the_unfinished_cases(pair: Pair) -> None:
    cases = make_cases(pair[0], PROMPTS)[:3]
    whole = run(pair, cases, batch_size=1)
    rest = run(pair, cases[1:], batch_size=2)
    assert {number: item.adversarial_prompt for number, item in rest.items()} == {
        number: item.adversarial_prompt for number, item in whole.items() if number in rest
    }


def test_the_unedited_model_predicts_without_gradients_and_for_the_plain_prompt(pair: Pair) -> None:
    model, original = pair
    seen = []
    predict = original.predict

    def recorded(latents: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        seen.append((torch.is_grad_enabled(), text))
        return predict(latents, timesteps, text)

    original.predict = recorded
    run(pair, make_cases(model, PROMPTS)[:1])
    assert not any(enabled for enabled, _ in seen)
    plain = original.encode([PROMPTS[0]])
    assert all(torch.allclose(row, plain[0]) for _, text in seen for row in text)
    for part in (model.network, original.network, model.text_encoder):
        assert all(parameter.grad is None for parameter in part.parameters())


def test_repeated_draws_make_every_check_draw_alike(pair: Pair) -> None:
    original, drawn = pair[1], []
    add_noise = original.add_noise
    original.add_noise = lambda latents, noise, timesteps: (
        drawn.append((noise, timesteps)),
        add_noise(latents, noise, timesteps),
    )[1]
    for repeat in (True, False):
        drawn.clear()
        run(pair, make_cases(original, PROMPTS)[:1], variant="insert", repeat_draws=repeat)
        (noise, timesteps), (later_noise, later_timesteps) = drawn
        assert torch.equal(noise, later_noise) == torch.equal(timesteps, later_timesteps) == repeat


def test_what_it_needs_is_asked_for_before_anything_is_spent(pair: Pair) -> None:
    model, original = pair
    cases = make_cases(model, PROMPTS)
    with pytest.raises(ValueError, match="original is None"):
        P4D().run(model, cases, never, sampling=SAMPLING)
    with pytest.raises(ValueError, match="case 10 has no target picture"):
        untargeted = dataclasses.replace(cases[0], target=None)
        P4D().run(model, [untargeted], never, sampling=SAMPLING, original=original)
    with pytest.raises(ValueError, match="30 tokens cannot be inserted"):
        P4D(tokens=30).run(model, [], never, sampling=SAMPLING, original=original)
    assert model.unet_evaluations == original.unet_evaluations == 0


@pytest.mark.parametrize(
    "field", [{"variant": "n"}, {"tokens": 0}, {"every": 0}, {"checks": 0}, {"optimizer": "sgd"}, {"learning_rate": 0}]
)
def test_fields_out_of_range_are_refused(field: dict) -> None:
    with pytest.raises(ValidationError):
        P4D(**field)
