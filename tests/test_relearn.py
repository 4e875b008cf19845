"""Relearning against a slow second implementation, the weights it draws with, and those it leaves behind."""

import dataclasses
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from pydantic import ValidationError

from attacks.cases import Outcome, PromptCase, evaluations_paid
from attacks.relearn import Relearn, denoising_gradient
from diffusion.model import TextToImage
from diffusion.parameters import named_parameters, substituted
from diffusion.sampling import Sampling
from diffusion.streams import stream
from erasure.edit import Edit
from erasure.parameters import scope_parameters
from evaluation.verdicts import Judge, Verdicts
from experiments.command.errors import CommandError
from tests.judges import never, one_in
from tests.oracles import relearn as oracle
from tests.tiny_job import CONFIG_FOLDER, make_job, method_config

PAIRS = (("a church in the snow", "a fish in the snow"), ("a red church", "a red fish"))
SAMPLING = Sampling(steps=2, batch_size=3)
PROMPTS = ["a church", "a red fish", "", "a golf ball in the snow", "two blue fish"]
CASES = [PromptCase(10 + number, prompt, 50 + number, 3.0) for number, prompt in enumerate(PROMPTS)]
SMALL = {
    "pairs": PAIRS,
    "count": 3,
    "checks": (1, 3),
    "pictures_per_step": 2,
    "learning_rate": 0.01,
    "parameters": "*.attn2.*",
}
PAINTING, PICTURE = 3 * 2 * SAMPLING.steps, 2 * SAMPLING.steps
by_pixels = one_in(3)

Pair = tuple[TextToImage, TextToImage]
"""The edited and the unedited model."""


def edited(model: TextToImage) -> Pair:
    """The model with a part of its cross-attention pruned, and the model without that."""
    generator = torch.Generator().manual_seed(9)
    masks = {
        name: torch.rand(value.shape, generator=generator) > 0.3
        for name, value in scope_parameters(model, "xattn").items()
        if value.ndim >= 2
    }
    edit = Edit.from_mask(masks)
    edit.apply(model)
    return model, edit.unedited(model)


@pytest.fixture
def pair(tiny_model64: TextToImage) -> Pair:
    return edited(tiny_model64)


def run(pair: Pair, judge: Judge = never, cases: Sequence[PromptCase] = CASES, **fields) -> dict[int, Outcome]:
    """Outcomes by case number."""
    outcomes = Relearn(**{**SMALL, **fields}).run(pair[0], cases, judge, sampling=SAMPLING, original=pair[1])
    return {outcome.case_number: outcome for outcome in outcomes}


@pytest.mark.parametrize(
    ("pictures", "parameters", "keep_zeros"), [("concept", "*.attn2.*", True), ("other", "*", False)]
)
def test_training_agrees_with_the_slow_implementation(
    pair: Pair, pictures: str, parameters: str, keep_zeros: bool
) -> None:
    model, original = pair
    fields = {"pictures": pictures, "parameters": parameters, "keep_zeros": keep_zeros, "weight_decay": 0.3, "seed": 4}
    snapshots = list(Relearn(**{**SMALL, **fields}).train(model, original, SAMPLING))
    prompts = [PAIRS[index][pictures == "other"] for index in (0, 1, 0)]
    seeds = torch.randint(2**31, (3,), generator=stream(4, "relearn/pictures")).tolist()
    images = original.generate(prompts, seeds=seeds, steps=SAMPLING.steps, guidance=7.5)
    slow = list(
        oracle.train(
            model.network,
            model.process.alphas.tolist(),
            list(model.encode_images(images)),
            list(model.encode_prompts(prompts)),
            trained=[name for name, _ in model.network.named_parameters() if ".attn2." in name or parameters == "*"],
            zeros_stay=keep_zeros,
            steps=3,
            size=2,
            rate=0.01,
            decay=0.3,
            seed=4,
        )
    )
    losses = [loss for loss, _ in slow]
    assert [snapshot.loss for snapshot in snapshots] == pytest.approx([losses[0], sum(losses[1:]) / 2], rel=1e-5)
    for snapshot, (_, expected) in zip(snapshots, (slow[0], slow[2]), strict=True):
        assert snapshot.weights.keys() == expected.keys()
        for name, weight in snapshot.weights.items():
            # Adam divides gradients that are zero but for rounding by their own size.
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)


def test_the_first_steps_cosine_is_that_of_minus_the_gradient_and_the_way_back(pair: Pair) -> None:
    model, original = pair
    attack = Relearn(**SMALL)
    snapshots = list(attack.train(model, original, SAMPLING))
    names = [name for name, _ in model.network.named_parameters() if ".attn2." in name]
    own, theirs = (dict(one.network.named_parameters()) for one in pair)
    way = torch.cat([(theirs[name] - own[name]).flatten() for name in names])
    # The loss along the way, from a little before to a little after, is what a gradient says of it.
    seeds = torch.randint(2**31, (3,), generator=stream(0, "relearn/pictures")).tolist()
    prompts = [PAIRS[index][0] for index in (0, 1, 0)]
    latents = model.encode_images(original.generate(prompts, seeds=seeds, steps=SAMPLING.steps, guidance=7.5))
    text = model.encode_prompts(prompts)

    def loss_and_gradient(share: float) -> tuple[float, torch.Tensor]:
        moved = {name: (own[name] + share * (theirs[name] - own[name])).detach().requires_grad_() for name in names}
        generator = stream(0, "relearn/training", 0)
        loss = denoising_gradient(model, moved, latents, text, SMALL["pictures_per_step"], generator)
        return loss, torch.cat([moved[name].grad.flatten() for name in names])

    slope = (loss_and_gradient(1e-4)[0] - loss_and_gradient(-1e-4)[0]) / 2e-4
    expected = -slope / float(way.norm() * loss_and_gradient(0)[1].norm())
    assert [snapshot.first_cosine for snapshot in snapshots] == pytest.approx([expected] * 2, rel=1e-4)
    outcomes = run(pair)
    assert outcomes[10].checks[-1].measured == {"first_step_cosine": snapshots[0].first_cosine}
    # From the unedited model there is no way back.
    assert [snapshot.first_cosine for snapshot in attack.train(original, original, SAMPLING)] == [None, None]


def test_pictures_of_neighbours_are_of_their_phrases(pair: Pair) -> None:
    like_other = {"pictures": "other"}
    phrases = {"pictures": "neighbours", "neighbours": tuple(absent for _, absent in PAIRS)}
    one, other = (list(Relearn(**SMALL | fields).train(*pair, SAMPLING)) for fields in (like_other, phrases))
    assert [snapshot.loss for snapshot in one] == [snapshot.loss for snapshot in other]
    with pytest.raises(ValueError, match=r"^pictures is neighbours and neighbours is empty; name phrases"):
        run(pair, pictures="neighbours")


def test_pictures_are_drawn_with_the_weights_of_their_step(pair: Pair) -> None:
    model, seen = pair[0], []

    def judge(images: torch.Tensor) -> Verdicts:
        seen.append(images[0])
        return never(images)

    (outcome,) = run(pair, judge, CASES[:1]).values()
    assert [check.variant for check in outcome.checks] == ["", "step 1", "step 3"]
    assert {check.prompt for check in outcome.checks} == {"a church"}
    for picture, snapshot in zip(seen[1:], Relearn(**SMALL).train(*pair, SAMPLING), strict=True):
        with substituted(model, snapshot.weights):
            (expected,) = model.generate(["a church"], seeds=[50], steps=2, guidance=3.0)
        assert torch.equal(picture, expected)
    assert len({picture.numpy().tobytes() for picture in seen}) == 3


def test_the_edited_weights_are_there_bit_for_bit_whenever_the_attack_hands_over(pair: Pair) -> None:
    model, original = pair
    parameters, before = named_parameters(model), (model.fingerprint(), original.fingerprint())

    def untouched() -> bool:
        now = named_parameters(model)
        same = all(now[name] is value and not value.requires_grad for name, value in parameters.items())
        return same and (model.fingerprint(), original.fingerprint()) == before

    def judge(images: torch.Tensor) -> Verdicts:
        assert untouched()
        return by_pixels(images)

    attack = Relearn(**SMALL, batch_size=2)
    for _ in attack.run(model, CASES, judge, sampling=SAMPLING, original=original):
        assert untouched()
    abandoned = attack.run(model, CASES, never, sampling=SAMPLING, original=original)
    next(abandoned)
    assert untouched()
    abandoned.close()
    assert untouched()


def test_zeros_are_kept_if_asked_for(pair: Pair) -> None:
    zeros = {name: value == 0 for name, value in pair[0].network.named_parameters() if value.ndim >= 2}
    for keep in (True, False):
        *_, last = Relearn(**{**SMALL, "keep_zeros": keep}).train(*pair, SAMPLING)
        matrices = {name: weight for name, weight in last.weights.items() if weight.ndim >= 2}
        still = [bool((weight[zeros[name]] == 0).all()) for name, weight in matrices.items() if zeros[name].any()]
        assert still
        assert all(still) == any(still) == keep
        assert any((weight[~zeros[name]] != 0).any() for name, weight in matrices.items())


def test_half_precision_is_trained_in_single_precision(tiny_model: TextToImage) -> None:
    model, original = edited(tiny_model)
    for part in (model.network, model.vae, model.text_encoder, original.network, original.text_encoder):
        part.to(torch.bfloat16)
    own = dict(model.network.named_parameters())
    # Too small a step for bfloat16; many add up.
    fields = {"learning_rate": 1e-4, "checks": (1, 40), "pictures_per_step": 1, "count": 1}
    first, last = (
        {name: weight for name, weight in snapshot.weights.items() if weight.ndim >= 2}
        for snapshot in Relearn(**{**SMALL, **fields}).train(model, original, SAMPLING)
    )
    assert {weight.dtype for weight in last.values()} == {torch.bfloat16}
    changed = [
        sum(int((weights[name] != own[name])[own[name] != 0].sum()) for name in weights) for weights in (first, last)
    ]
    assert changed[1] > 3 * changed[0]


def test_every_cases_cost_is_exact_and_the_training_is_paid_once(pair: Pair) -> None:
    outcomes = run(pair, by_pixels, batch_size=2)
    assert {len(outcome.checks) for outcome in outcomes.values()} >= {1, 3}
    spent = sum(model.unet_evaluations for model in pair)
    assert evaluations_paid([outcome.checks[-1] for outcome in outcomes.values()]) == spent
    for outcome in outcomes.values():
        shared = [0, PAINTING + 1 * 2, PAINTING + 3 * 2][: len(outcome.checks)]
        assert [check.shared_evaluations for check in outcome.checks] == shared
        pictures = [PICTURE * number for number in range(1, len(shared) + 1)]
        assert [check.unet_evaluations for check in outcome.checks] == [
            own + common for own, common in zip(pictures, shared, strict=True)
        ]


def test_nothing_is_trained_that_no_case_needs(pair: Pair) -> None:
    def always(images: torch.Tensor) -> Verdicts:
        return Verdicts(torch.ones(len(images), dtype=torch.bool), torch.ones(len(images)))

    assert all(outcome.plain_success for outcome in run(pair, always).values())
    assert pair[0].unet_evaluations == len(CASES) * PICTURE
    assert pair[1].unet_evaluations == 0


def test_outcomes_do_not_depend_on_batch_size_or_order(pair: Pair) -> None:
    alone = run(pair, by_pixels, batch_size=1)
    for other in (run(pair, by_pixels, batch_size=5), run(pair, by_pixels, CASES[::-1], batch_size=2)):
        assert other == alone
        assert all(torch.equal(other[number].image, outcome.image) for number, outcome in alone.items())


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        (one_in(2), r"half of 5 prompts show the concept after \d steps"),
        (never, "3 steps bring back less than half of 5 prompts"),
    ],
)
def test_it_says_when_half_of_the_prompts_are_back(
    pair: Pair, caplog: pytest.LogCaptureFixture, judge: Judge, said: str
) -> None:
    with caplog.at_level(logging.INFO):
        outcomes = run(pair, judge)
    (record,) = caplog.records
    assert re.fullmatch(f"relearn: {said}", record.message)
    assert outcomes


def test_what_it_needs_is_asked_for_before_anything_is_spent(pair: Pair) -> None:
    model, original = pair
    with pytest.raises(ValueError, match="original is None"):
        Relearn(**SMALL).run(model, CASES, never, sampling=SAMPLING)
    with pytest.raises(ValueError, match=r"parameters is 'attn3'"):
        run(pair, parameters="attn3")
    assert model.unet_evaluations == original.unet_evaluations == 0


@pytest.mark.parametrize(
    "field",
    [
        {"pairs": ()},
        {"pictures": "both"},
        {"count": 0},
        {"guidance": 0.5},
        {"checks": ()},
        {"checks": (0, 1)},
        {"checks": (2, 2)},
        {"checks": (5, 1)},
        {"learning_rate": 0},
        {"weight_decay": -1},
        {"pictures_per_step": 0},
    ],
)
def test_fields_out_of_range_are_refused(field: dict) -> None:
    with pytest.raises(ValidationError):
        Relearn(**{**SMALL, **field})


def test_checks_that_do_not_grow_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIG_FOLDER.parent)
    with pytest.raises(CommandError, match=r"^attack.checks: checks is \[5, 2\]; it must be a list of growing numbers"):
        make_job("attack=relearn", "attack.checks=[5,2]", "tracker=off")


@pytest.mark.parametrize("kind", ["style", "object", "unsafe"])
@pytest.mark.parametrize("family", ["canvas", "sd"])
def test_config_instantiates_and_names_every_field(family: str, kind: str, name: str = "relearn") -> None:
    path = CONFIG_FOLDER.parent / "prompts/canvas/fire_pairs.csv"
    config = method_config("attack", name, concept={"kind": kind, "pairs": str(path)}, model={"family": family})
    attack = instantiate(config, _convert_="all")
    assert set(config) - {"_target_"} == {field.name for field in dataclasses.fields(attack)}
    assert attack.seed == 7
    assert attack.pairs == Path(path)
