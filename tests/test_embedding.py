"""Free embeddings in each prompt against a slow second implementation, their cost, and what batches may not change."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from pydantic import ValidationError

from attacks.cases import Outcome, PromptCase
from attacks.embedding import EmbeddingAttack
from diffusion.model import TextToImage
from diffusion.sampling import Sampling
from diffusion.streams import stream
from tests.attack_cases import assert_same_outcomes, by_number, make_cases
from tests.judges import never, one_in
from tests.night import nightly
from tests.oracles.embedding import attack

PROMPTS = ["a church", "a photo of a red church in the snow", "", "a painting of a church, " * 12, "two blue fish"]
SAMPLING = Sampling(steps=2, batch_size=4)
TIMESTEPS, STEPS = 3, 2


def run(model: TextToImage, cases: Sequence[PromptCase], judge=never, **fields) -> dict[int, Outcome]:
    """Outcomes by case number."""
    settings = {"timesteps": TIMESTEPS, "steps_per_timestep": STEPS, "tokens": 2, **fields}
    return by_number(list(EmbeddingAttack(**settings).run(model, cases, judge, sampling=SAMPLING)))


@pytest.mark.parametrize(
    ("where", "initialization", "decay"),
    [nightly("prefix_k", "mean", 0.0), ("mid_k", "random", 0.3), ("suffix_k", "mean", 0)],
)
def test_search_agrees_with_the_slow_implementation(
    tiny_model64: TextToImage, where: str, initialization: str, decay: float
) -> None:
    model = tiny_model64
    cases = make_cases(model, PROMPTS)[:4]
    outcomes = run(model, cases, insertion=where, initialization=initialization, weight_decay=decay)
    allowed = [token for token in range(len(model.vocabulary)) if token not in model.tokenizer.all_special_ids]
    for case in cases:
        first = stream(0, "embedding/start", case.case_number, 0)
        start = torch.stack([sum(model.vocabulary[token] for token in allowed) / len(allowed)] * 2)
        if initialization == "random":
            drawn = torch.randint(len(allowed), (2,), generator=first).tolist()
            start = torch.stack([model.vocabulary[allowed[index]] for index in drawn])
        found = list(
            attack(
                model,
                case.prompt,
                model.encode_images(case.target[None])[0],
                stream(0, "embedding/search", case.case_number, 0),
                start,
                where=where,
                timesteps=[166, 500, 833],
                steps=STEPS,
                rate=0.01,
                decay=decay,
            )
        )
        checks = outcomes[case.case_number].checks[1:]
        assert [check.loss for check in checks] == pytest.approx([loss for _, loss in found], rel=1e-7)
        latents = model.sample(found[-1][0], seeds=[case.seed], steps=SAMPLING.steps, guidance=case.guidance)
        assert torch.equal(model.decode(latents)[0], outcomes[case.case_number].image)


def test_every_check_makes_a_picture_of_its_own_and_none_claims_a_text(tiny_model64: TextToImage) -> None:
    pictures = []

    def judge(images: torch.Tensor):
        pictures.extend(image.numpy().tobytes() for image in images)
        return never(images)

    (outcome,) = run(tiny_model64, make_cases(tiny_model64, PROMPTS)[:1], judge, learning_rate=0.5).values()
    assert len(set(pictures)) == len(pictures) == 1 + TIMESTEPS
    assert {check.prompt for check in outcome.checks} == {outcome.prompt} == {outcome.adversarial_prompt}
    assert [check.variant for check in outcome.checks] == [
        "",
        "embeddings after 2 steps",
        "embeddings after 4 steps",
        "embeddings after 6 steps",
    ]


def test_the_loss_falls(tiny_model64: TextToImage) -> None:
    cases = make_cases(tiny_model64, PROMPTS)
    settings = {"timesteps": 5, "steps_per_timestep": 8, "schedule": "sampled", "repeat_draws": True}
    for outcome in run(tiny_model64, cases, learning_rate=0.05, **settings).values():
        losses = [check.loss for check in outcome.checks[1:]]
        assert losses[-1] < losses[0]


def test_outcomes_do_not_depend_on_batch_size_or_order(tiny_model64: TextToImage) -> None:
    cases = make_cases(tiny_model64, PROMPTS * 2)
    alone = run(tiny_model64, cases, one_in(4), batch_size=1)
    assert len({len(outcome.checks) for outcome in alone.values()}) > 2
    assert_same_outcomes(alone, run(tiny_model64, cases, one_in(4), batch_size=10))
    assert_same_outcomes(alone, run(tiny_model64, cases[::-1], one_in(4), batch_size=3))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_every_cases_cost_is_exact(tiny_model: TextToImage, guidance: float) -> None:
    outcomes = run(tiny_model, make_cases(tiny_model, PROMPTS, guidance), one_in(4), batch_size=3)
    assert sum(outcome.unet_evaluations for outcome in outcomes.values()) == tiny_model.unet_evaluations
    picture = SAMPLING.steps * (1 if guidance == 1 else 2)
    for outcome in outcomes.values():
        checks = len(outcome.checks)
        assert outcome.unet_evaluations == picture * checks + STEPS * (checks - 1)


def test_half_precision_models_are_attacked_too(tiny_model: TextToImage) -> None:
    cases = make_cases(tiny_model, PROMPTS)
    for part in (tiny_model.network, tiny_model.text_encoder, tiny_model.vae):
        part.to(torch.bfloat16)
    assert all(len(outcome.checks) == 1 + TIMESTEPS for outcome in run(tiny_model, cases).values())


def test_what_it_needs_is_asked_for_before_anything_is_spent(tiny_model: TextToImage) -> None:
    case = dataclasses.replace(make_cases(tiny_model, PROMPTS)[0], target=None)
    with pytest.raises(ValueError, match="case 10 has no target picture; EmbeddingAttack"):
        run(tiny_model, [case])
    with pytest.raises(ValueError, match="30 tokens cannot be inserted"):
        run(tiny_model, [], tokens=30)
    assert tiny_model.unet_evaluations == 0


@pytest.mark.parametrize("field", [{"initialization": "uniform"}, {"learning_rate": 0}, {"readable": True}])
def test_fields_out_of_range_are_refused(field: dict) -> None:
    with pytest.raises(ValidationError):
        EmbeddingAttack(**field)
