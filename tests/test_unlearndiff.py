"""UnlearnDiffAtk against a slow second implementation, and what batches may not change."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from pydantic import ValidationError

from attacks.cases import Outcome, PromptCase
from attacks.prompt_search import adam_step, embedding_gradient
from attacks.unlearndiff import UnlearnDiffAtk, draw_tokens, straight_through_gradient
from diffusion.model import TextToImage
from diffusion.prompt_template import PromptTemplate
from diffusion.sampling import Sampling
from diffusion.streams import stream
from evaluation.verdicts import Verdicts
from tests.attack_cases import assert_same_outcomes, make_cases
from tests.judges import never, one_in
from tests.oracles.unlearndiff import Adam, attack, loss_of_one_hot

PROMPTS = [
    "a church",
    "a photo of a red church in the snow",
    "",
    "a golf ball in van gogh style",
    "a painting of a church, " * 12,
    "two blue fish",
]
SAMPLING = Sampling(steps=2, batch_size=4)
by_pixels = one_in(5)
STEPS = 2


def run(model: TextToImage, cases: Sequence[PromptCase], judge=by_pixels, **fields) -> dict[int, Outcome]:
    """Outcomes by case number."""
    settings = {"timesteps": 4, "steps_per_timestep": STEPS, "learning_rate": 0.05, **fields}
    outcomes = list(UnlearnDiffAtk(**settings).run(model, cases, judge, sampling=SAMPLING))
    assert len(outcomes) == len(cases)
    return {outcome.case_number: outcome for outcome in outcomes}


@pytest.mark.parametrize(("where", "tokens"), [("prefix_k", 2), ("insert_k", 1)])
def test_search_agrees_with_the_slow_implementation(tiny_model64: TextToImage, where: str, tokens: int) -> None:
    model = tiny_model64
    cases = make_cases(model, PROMPTS)[:2]
    outcomes = run(model, cases, never, tokens=tokens, insertion=where, timesteps=2, weight_decay=0.3)
    for case in cases:
        blocks = attack(
            model,
            case.prompt,
            model.encode_images(case.target[None])[0],
            stream(0, "unlearndiff/search", case.case_number, 0),
            tokens=tokens,
            where=where,
            timesteps=[250, 750],
            steps=STEPS,
            rate=0.05,
            decay=0.3,
        )
        plain, *checks = outcomes[case.case_number].checks
        assert plain.prompt == case.prompt
        for check, (text, loss, _) in zip(checks, blocks, strict=True):
            assert check.prompt == text
            assert check.loss == pytest.approx(loss, rel=1e-7)


@pytest.mark.parametrize("where", ["prefix_k", "suffix_k", "mid_k", "insert_k", "per_k_words"])
def test_straight_through_gradient_agrees_with_explicit_one_hot_rows(tiny_model64: TextToImage, where: str) -> None:
    model = tiny_model64
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(20, 200, (len(PROMPTS), 3), generator=generator)
    targets, noise = torch.randn(2, len(PROMPTS), *model.latent_shape, generator=generator).double()
    timesteps = torch.tensor([10, 990, 500, 30, 70, 210])
    template = PromptTemplate.insert(model, PROMPTS, 3, where)
    latents = model.add_noise(targets, noise, timesteps)
    gradient, losses = embedding_gradient(model, template, model.vocabulary[tokens], latents, timesteps, noise)
    ours = straight_through_gradient(gradient * 1e3, model.vocabulary)
    assert (ours.abs() == 1).any()
    assert (ours.abs() < 1).any()
    for index, prompt in enumerate(PROMPTS):
        one_hot = torch.nn.functional.one_hot(tokens[index], len(model.vocabulary)).double().requires_grad_()
        loss = loss_of_one_hot(model, prompt, one_hot, where, targets[index], noise[index], int(timesteps[index]))
        (1e3 * loss).backward()
        torch.testing.assert_close(losses[index], loss.detach(), rtol=1e-10, atol=0)
        torch.testing.assert_close(ours[index], one_hot.grad.clamp(-1, 1), rtol=1e-7, atol=1e-12)


def test_l1_is_the_mean_absolute_error(tiny_model64: TextToImage) -> None:
    model = tiny_model64
    targets, noise = torch.randn(2, 1, *model.latent_shape, generator=torch.Generator().manual_seed(0)).double()
    template = PromptTemplate.insert(model, ["a church"], 1, "prefix_k")
    embeddings = model.vocabulary[torch.tensor([[30]])]
    latents = model.add_noise(targets, noise, 40)
    _, loss = embedding_gradient(model, template, embeddings, latents, torch.tensor([40]), noise, criterion="l1")
    abar = float(model.process.alphas[40])
    predicted = model.predict(abar**0.5 * targets + (1 - abar) ** 0.5 * noise, 40, template.encode(model, embeddings))
    assert loss.item() == pytest.approx((predicted - noise).abs().mean().item(), rel=1e-6)


def test_adam_agrees_with_the_formula_for_prompts_of_different_age() -> None:
    generator = torch.Generator().manual_seed(3)
    first_steps = torch.tensor([1, 1, 3])
    rows = torch.rand(3, 1, 4, generator=generator, dtype=torch.float64)
    mean, variance = torch.zeros_like(rows), torch.zeros_like(rows)
    slow = [[Adam(0.02, 0.1) for _ in range(4)] for _ in range(3)]
    for adams in slow[2]:
        adams.count = 2
    expected = rows[:, 0].tolist()
    for step in range(5):
        gradient = torch.randn(3, 1, 4, generator=generator, dtype=torch.float64) * 1e-3
        adam_step(rows, gradient, mean, variance, steps=first_steps + step, learning_rate=0.02, weight_decay=0.1)
        expected = [
            [adam.step(value, slope) for adam, value, slope in zip(adams, values, slopes, strict=True)]
            for adams, values, slopes in zip(slow, expected, gradient[:, 0].tolist(), strict=True)
        ]
    torch.testing.assert_close(rows[:, 0], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_tokens_are_drawn_with_their_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64).expand(20_000, 4)
    race = torch.empty(20_000, 4, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(0))
    shares = draw_tokens(probabilities, race).bincount(minlength=4) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2, 0.0]), rtol=0, atol=0.015)


@pytest.mark.parametrize("schedule", ["even", "sampled"])
def test_outcomes_do_not_depend_on_batch_size_or_order(tiny_model64: TextToImage, schedule: str) -> None:
    cases = make_cases(tiny_model64, [*PROMPTS, *PROMPTS[:3]])
    alone = run(tiny_model64, cases, batch_size=1, schedule=schedule)
    together = run(tiny_model64, cases, batch_size=9, schedule=schedule)
    shuffled = run(tiny_model64, cases[::-1], batch_size=4, schedule=schedule)
    ends = {len(outcome.checks) for outcome in alone.values()}
    assert len(ends) > 2, "the stub judge should stop the prompts at different checks"
    for number, outcome in alone.items():
        for other in (together[number], shuffled[number]):
            assert dataclasses.replace(other, checks=()) == dataclasses.replace(outcome, checks=())
            assert torch.equal(other.image, outcome.image)
            for ours, theirs in zip(other.checks, outcome.checks, strict=True):
                assert dataclasses.replace(ours, loss=None) == dataclasses.replace(theirs, loss=None)
                assert ours.loss is theirs.loss is None or ours.loss == pytest.approx(theirs.loss, rel=1e-9)


def test_an_interrupted_run_goes_on_with_the_unfinished_cases(tiny_model64: TextToImage) -> None:
    cases = make_cases(tiny_model64, PROMPTS)
    whole = run(tiny_model64, cases)
    outcomes = UnlearnDiffAtk(timesteps=4, steps_per_timestep=STEPS, learning_rate=0.05, batch_size=2).run(
        tiny_model64, cases, by_pixels, sampling=SAMPLING
    )
    first = [next(outcomes), next(outcomes)]
    outcomes.close()
    rest = run(tiny_model64, [case for case in cases if case.case_number not in {item.case_number for item in first}])
    resumed = {item.case_number: item for item in first} | rest
    assert {number: item.adversarial_prompt for number, item in resumed.items()} == {
        number: item.adversarial_prompt for number, item in whole.items()
    }


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_every_cases_cost_is_exact(tiny_model: TextToImage, guidance: float) -> None:
    cases = make_cases(tiny_model, PROMPTS, guidance)
    before = tiny_model.unet_evaluations
    outcomes = run(tiny_model, cases, batch_size=4)
    assert sum(outcome.unet_evaluations for outcome in outcomes.values()) == tiny_model.unet_evaluations - before
    picture = SAMPLING.steps * (1 if guidance == 1 else 2)
    for outcome in outcomes.values():
        pictures = len({check.prompt for check in outcome.checks})
        assert outcome.unet_evaluations == STEPS * (len(outcome.checks) - 1) + picture * pictures
        assert outcome.checks[-1].unet_evaluations == outcome.unet_evaluations


def test_a_neighbour_with_guidance_does_not_make_an_unguided_case_pay(tiny_model: TextToImage) -> None:
    guided, unguided = make_cases(tiny_model, ["a church", "a fish"])
    unguided = dataclasses.replace(unguided, guidance=1.0)
    before = tiny_model.unet_evaluations
    outcomes = run(tiny_model, [guided, unguided], never)
    assert outcomes[guided.case_number].checks[0].unet_evaluations == 2 * SAMPLING.steps
    assert outcomes[unguided.case_number].checks[0].unet_evaluations == SAMPLING.steps
    assert sum(outcome.unet_evaluations for outcome in outcomes.values()) == tiny_model.unet_evaluations - before


def test_a_prompt_that_succeeds_as_it_stands_is_not_attacked(tiny_model: TextToImage) -> None:
    def always(images: torch.Tensor) -> Verdicts:
        return Verdicts(torch.ones(len(images), dtype=torch.bool), torch.ones(len(images)))

    for outcome in run(tiny_model, make_cases(tiny_model, PROMPTS), always).values():
        assert outcome.plain_success
        assert outcome.success
        assert outcome.adversarial_prompt == outcome.prompt
        assert len(outcome.checks) == 1
        assert outcome.unet_evaluations == 2 * SAMPLING.steps


def test_search_stops_at_the_first_success(tiny_model: TextToImage) -> None:
    for outcome in run(tiny_model, make_cases(tiny_model, PROMPTS * 2)).values():
        *earlier, last = outcome.checks
        assert not any(check.present for check in earlier)
        assert last.present == outcome.success
        assert outcome.success or len(outcome.checks) == 5
        assert last.prompt == outcome.adversarial_prompt


def test_the_adversarial_prompt_is_text_that_draws_the_judged_picture(tiny_model64: TextToImage) -> None:
    cases = make_cases(tiny_model64, PROMPTS)
    outcomes = run(tiny_model64, cases)
    for case in cases:
        outcome = outcomes[case.case_number]
        again = tiny_model64.generate([outcome.adversarial_prompt], seeds=[case.seed], steps=2, guidance=case.guidance)
        assert torch.equal(again[0], outcome.image)


def test_unchanged_text_is_not_drawn_again(tiny_model: TextToImage) -> None:
    outcomes = run(tiny_model, make_cases(tiny_model, PROMPTS), never, tokens=1, timesteps=20, steps_per_timestep=1)
    outcome = outcomes[10]
    texts = [check.prompt for check in outcome.checks]
    assert len(texts) == 21
    assert len(set(texts)) < 21
    assert outcome.unet_evaluations == 20 + 2 * SAMPLING.steps * len(set(texts))


def test_repeated_draws_make_every_timestep_draw_alike(tiny_model64: TextToImage) -> None:
    model, drawn = tiny_model64, []
    add_noise = model.add_noise
    model.add_noise = lambda latents, noise, timesteps: (drawn.append(noise), add_noise(latents, noise, timesteps))[1]
    run(model, make_cases(model, PROMPTS)[:1], never, timesteps=2, repeat_draws=True)
    assert torch.equal(torch.cat(drawn[:STEPS]), torch.cat(drawn[STEPS:]))
    drawn.clear()
    run(model, make_cases(model, PROMPTS)[:1], never, timesteps=2)
    assert len({tuple(noise.flatten().tolist()) for noise in drawn}) == 2 * STEPS


@pytest.mark.parametrize(("count", "expected"), [(50, range(10, 1000, 20)), (3, [166, 500, 833])])
def test_timesteps_are_spread_from_low_noise_to_high(
    tiny_model: TextToImage, count: int, expected: Sequence[int]
) -> None:
    visited = []
    add_noise = tiny_model.add_noise
    tiny_model.add_noise = lambda latents, noise, timesteps: (
        visited.append(int(timesteps[0])),
        add_noise(latents, noise, timesteps),
    )[1]
    run(tiny_model, make_cases(tiny_model, PROMPTS)[:1], never, timesteps=count, steps_per_timestep=1, tokens=1)
    assert visited == list(expected)


def test_nothing_but_the_inserted_embeddings_receives_a_gradient(tiny_model: TextToImage) -> None:
    run(tiny_model, make_cases(tiny_model, PROMPTS)[:2], timesteps=1)
    for part in (tiny_model.network, tiny_model.text_encoder, tiny_model.vae):
        assert all(parameter.grad is None for parameter in part.parameters())


def test_random_initialisation_and_special_tokens_are_on_offer(tiny_model: TextToImage) -> None:
    outcomes = run(tiny_model, make_cases(tiny_model, PROMPTS), never, initialization="random", exclude_special=False)
    assert all(len(outcome.checks) == 5 for outcome in outcomes.values())


def test_a_case_without_target_is_refused_before_anything_is_spent(tiny_model: TextToImage) -> None:
    case = dataclasses.replace(make_cases(tiny_model, PROMPTS)[0], target=None)
    with pytest.raises(ValueError, match="case 10 has no target picture"):
        UnlearnDiffAtk().run(tiny_model, [case], never, sampling=SAMPLING)
    assert tiny_model.unet_evaluations == 0


def test_too_many_tokens_or_timesteps_are_refused(tiny_model: TextToImage) -> None:
    with pytest.raises(ValueError, match="30 tokens cannot be inserted"):
        UnlearnDiffAtk(tokens=30).run(tiny_model, [], never, sampling=SAMPLING)
    with pytest.raises(ValueError, match="timesteps is 1001"):
        UnlearnDiffAtk(timesteps=1001).run(tiny_model, [], never, sampling=SAMPLING)


@pytest.mark.parametrize(
    "field",
    [{"tokens": 0}, {"insertion": "infix"}, {"timesteps": 0}, {"learning_rate": -1}, {"batch_size": 0}, {"wd": 0.1}],
)
def test_fields_out_of_range_are_refused(field: dict) -> None:
    with pytest.raises(ValidationError):
        UnlearnDiffAtk(**field)


def test_a_restart_goes_as_a_search_of_its_own(tiny_model64: TextToImage, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = make_cases(tiny_model64, PROMPTS[:2])
    first = run(tiny_model64, cases, never, timesteps=2)
    both = run(tiny_model64, cases, never, timesteps=2, restarts=1, batch_size=1)
    for name in ("start_stream", "search_stream"):
        purpose = f"unlearndiff/{name.removesuffix('_stream')}"
        monkeypatch.setattr(UnlearnDiffAtk, name, lambda _, number, restart, of=purpose: stream(0, of, number, 1))
    second = run(tiny_model64, cases, never, timesteps=2, initialization="random")
    for number, outcome in both.items():
        expected = [*first[number].checks, *second[number].checks[1:]]
        assert [check.prompt for check in outcome.checks] == [check.prompt for check in expected]
        for ours, theirs in zip(outcome.checks[1:], expected[1:], strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-9)


def test_the_first_success_of_a_restart_ends_it_whatever_the_batch(tiny_model64: TextToImage) -> None:
    cases = make_cases(tiny_model64, [*PROMPTS, *PROMPTS[:3]])
    once = run(tiny_model64, cases, timesteps=2)
    alone = run(tiny_model64, cases, timesteps=2, restarts=2, batch_size=1)
    together = run(tiny_model64, cases[::-1], timesteps=2, restarts=2, batch_size=9)
    assert any(len(outcome.checks) > 3 and outcome.success for outcome in alone.values())
    for number, outcome in alone.items():
        assert not any(check.present for check in outcome.checks[:-1])
        assert outcome.success or len(outcome.checks) == 7
        if once[number].success:
            assert_same_outcomes({number: outcome}, {number: once[number]})
        assert [check.prompt for check in together[number].checks] == [check.prompt for check in outcome.checks]
        assert together[number].unet_evaluations == outcome.unet_evaluations
