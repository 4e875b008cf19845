"""Concept inversion against a slow second implementation, what the training costs, and what batches may not change."""

import dataclasses
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from pydantic import ValidationError

import experiments  # noqa: F401 - it resolves what configs set by the kind of the concept
from attacks.cases import Outcome, PromptCase, evaluations_paid
from attacks.textual_inversion import TextualInversion
from diffusion.model import TextToImage
from diffusion.sampling import Sampling
from evaluation.verdicts import Judge, Verdicts
from experiments.command.errors import CommandError
from tests.attack_cases import assert_same_outcomes, by_number
from tests.conftest import make_tiny_pipeline
from tests.judges import never, one_in
from tests.night import nightly
from tests.oracles import textual_inversion as oracle
from tests.oracles.p4d import encode
from tests.tiny_job import CONFIG_FOLDER, make_job, method_config

PAIRS = (("a church in the snow", "the snow"), ("a red church", "red"))
TEMPLATES = ("a photo of a {}", "{} in the snow", "a small blue fish, " * 8 + "{}")
SAMPLING = Sampling(steps=2, batch_size=3)
PROMPTS = ["a church", "a red fish", "", "a golf ball in the snow, " * 6, "two blue fish"]
CASES = [PromptCase(10 + number, prompt, 50 + number, 3.0) for number, prompt in enumerate(PROMPTS)]
SMALL = {
    "pairs": PAIRS,
    "pictures": 3,
    "tokens": 2,
    "checks": 3,
    "steps_per_check": 2,
    "pictures_per_step": 2,
    "learning_rate": 0.05,
}
PAINTING, PICTURE, TRAINING = 3 * 2 * SAMPLING.steps, 2 * SAMPLING.steps, 2 * 2
by_pixels = one_in(3)

Pair = tuple[TextToImage, TextToImage]
"""The edited and the unedited model."""


@pytest.fixture
def pair(tiny_model64: TextToImage, tokenizer_folder: Path) -> Pair:
    pipeline = make_tiny_pipeline(tokenizer_folder, seed=1).to(torch.float64)
    return tiny_model64, TextToImage(pipeline, name="original")


def run(pair: Pair, judge: Judge = never, cases: Sequence[PromptCase] = CASES, **fields) -> dict[int, Outcome]:
    """Outcomes by case number."""
    attack = TextualInversion(**{**SMALL, **fields})
    return by_number(list(attack.run(pair[0], cases, judge, sampling=SAMPLING, original=pair[1])))


def always(images: torch.Tensor) -> Verdicts:
    return Verdicts(torch.ones(len(images), dtype=torch.bool), torch.ones(len(images)))


@pytest.mark.parametrize(
    "fields",
    [
        nightly({"weight_decay": 2.0, "seed": 4}),
        {"captions": TEMPLATES, "flip": False, "initial_word": "church"},
        {"insertion": "mid_k", "initialization": "random", "batch_size": 1, "picture_guidance": 1.0},
    ],
)
def test_training_and_pictures_agree_with_the_slow_implementation(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, fields: dict
) -> None:
    model, original = pair
    attack = TextualInversion(**{**SMALL, **fields})
    start = oracle.first_embeddings(
        model, 2, word=attack.initial_word, random=attack.initialization == "random", seed=attack.seed
    )
    prompts, images = oracle.pictures(
        original, [present for present, _ in PAIRS], 3, seed=attack.seed, guidance=attack.picture_guidance, steps=2
    )
    slow = list(
        oracle.train(
            model,
            prompts,
            images,
            start,
            flip=attack.flip,
            templates=None if attack.captions == "prompts" else list(attack.captions),
            where=attack.insertion,
            steps=6,
            size=2,
            rate=0.05,
            decay=attack.weight_decay,
            seed=attack.seed,
        )
    )
    snapshots = list(attack._train(model, original, attack._start(model), SAMPLING))
    for number, snapshot in enumerate(snapshots):
        (_, first), (embeddings, second) = slow[2 * number : 2 * number + 2]
        torch.testing.assert_close(snapshot.embeddings, embeddings, rtol=1e-7, atol=1e-9)
        assert snapshot.loss == pytest.approx((first + second) / 2, rel=1e-9)
    assert len(snapshots) == 3

    texts, sample = [], model.sample
    monkeypatch.setattr(model, "sample", lambda text, **rest: texts.append(text.clone()) or sample(text, **rest))
    for outcome in run(pair, cases=CASES[3:4], **fields).values():
        assert [check.loss for check in outcome.checks] == [None, *[snapshot.loss for snapshot in snapshots]]
        for text, (embeddings, _) in zip(texts[1:], slow[1::2], strict=True):
            body = oracle.prompt_with(model, PROMPTS[3], embeddings, attack.insertion)
            torch.testing.assert_close(text, encode(model, body), rtol=1e-7, atol=1e-9)


def test_an_initial_word_of_several_tokens_starts_at_their_mean(pair: Pair) -> None:
    model = pair[0]
    ids = model.tokenizer("a church", add_special_tokens=False).input_ids
    assert len(set(ids)) > 1
    start = TextualInversion(**SMALL, initial_word="a church")._start(model)
    mean = sum(model.vocabulary[token] for token in ids) / len(ids)
    torch.testing.assert_close(start, torch.stack([mean, mean]), rtol=1e-12, atol=1e-15)


def test_every_check_makes_a_picture_of_its_own_and_none_claims_a_text(pair: Pair) -> None:
    pictures = []

    def judge(images: torch.Tensor) -> Verdicts:
        pictures.extend(image.numpy().tobytes() for image in images)
        return never(images)

    (outcome,) = run(pair, judge, CASES[:1], learning_rate=0.5).values()
    assert len(set(pictures)) == len(pictures) == 4
    assert {check.prompt for check in outcome.checks} == {"a church"} == {outcome.adversarial_prompt}
    steps = ["embedding after 2 steps", "embedding after 4 steps", "embedding after 6 steps"]
    assert [check.variant for check in outcome.checks] == ["", *steps]


def test_every_cases_cost_is_exact_and_the_training_is_paid_once(pair: Pair) -> None:
    outcomes = run(pair, by_pixels, batch_size=2)
    assert len({len(outcome.checks) for outcome in outcomes.values()}) > 2
    spent = sum(model.unet_evaluations for model in pair)
    assert evaluations_paid([outcome.checks[-1] for outcome in outcomes.values()]) == spent
    for outcome in outcomes.values():
        shared = [0, *(PAINTING + TRAINING * number for number in (1, 2, 3))][: len(outcome.checks)]
        assert [check.shared_evaluations for check in outcome.checks] == shared
        assert [check.unet_evaluations for check in outcome.checks] == [
            PICTURE * number + common for number, common in enumerate(shared, start=1)
        ]
        assert outcome.unet_evaluations == outcome.checks[-1].unet_evaluations


def test_nothing_is_trained_that_no_case_needs(pair: Pair) -> None:
    assert all(outcome.plain_success for outcome in run(pair, always).values())
    assert pair[0].unet_evaluations == len(CASES) * PICTURE
    assert pair[1].unet_evaluations == 0


def test_training_stops_where_the_last_case_does(pair: Pair) -> None:
    verdicts = iter([False, True])
    judge = lambda images: Verdicts(torch.tensor([next(verdicts)] * len(images)), torch.zeros(len(images)))  # noqa: E731
    (outcome,) = run(pair, judge, CASES[:1]).values()
    assert outcome.success
    assert pair[0].unet_evaluations == 2 * PICTURE + TRAINING
    assert pair[1].unet_evaluations == PAINTING


def test_outcomes_do_not_depend_on_batch_size_or_order(pair: Pair) -> None:
    alone = run(pair, by_pixels, batch_size=1)
    assert len({len(outcome.checks) for outcome in alone.values()}) > 2
    assert_same_outcomes(alone, run(pair, by_pixels, batch_size=5))
    assert_same_outcomes(alone, run(pair, by_pixels, CASES[::-1], batch_size=2))


def test_an_interrupted_attack_goes_on_with_the_same_outcomes(pair: Pair) -> None:
    attack = TextualInversion(**SMALL, batch_size=2)
    whole = by_number(list(attack.run(pair[0], CASES, by_pixels, sampling=SAMPLING, original=pair[1])))
    running = attack.run(pair[0], CASES, by_pixels, sampling=SAMPLING, original=pair[1])
    some = by_number(list(islice(running, 2)))
    running.close()
    assert any(len(outcome.checks) > 1 for outcome in some.values())
    rest = run(pair, by_pixels, [case for case in CASES if case.case_number not in some], batch_size=2)
    assert any(len(outcome.checks) > 1 for outcome in rest.values())
    assert_same_outcomes(whole, some | rest)


def test_half_precision_models_are_attacked_too(tiny_model: TextToImage) -> None:
    for part in (tiny_model.network, tiny_model.text_encoder, tiny_model.vae):
        part.to(torch.bfloat16)
    outcomes = run((tiny_model, tiny_model), cases=CASES[:2])
    assert all(len(outcome.checks) == 4 for outcome in outcomes.values())
    assert evaluations_paid([outcome.checks[-1] for outcome in outcomes.values()]) == tiny_model.unet_evaluations


def test_nothing_but_the_embedding_receives_a_gradient(pair: Pair) -> None:
    before = [model.fingerprint() for model in pair]
    run(pair, cases=CASES[:1])
    assert [model.fingerprint() for model in pair] == before
    for model in pair:
        for part in (model.network, model.text_encoder, model.vae):
            assert all(parameter.grad is None for parameter in part.parameters())


def test_what_it_needs_is_asked_for_before_anything_is_spent(pair: Pair) -> None:
    model, original = pair
    with pytest.raises(ValueError, match=r"^original is None; TextualInversion learns from .*: give it\.$"):
        TextualInversion(**SMALL).run(model, CASES, never, sampling=SAMPLING)
    for fields, sentence in [
        ({"tokens": 30}, "^30 tokens cannot be inserted"),
        ({"initial_word": " "}, "^initial_word is ' ', in which the tokenizer finds no token.$"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            TextualInversion(**{**SMALL, **fields}).run(model, [], never, sampling=SAMPLING, original=original)
    assert model.unet_evaluations == original.unet_evaluations == 0


@pytest.mark.parametrize(
    "field",
    [
        {"pairs": ()},
        {"pairs": None},
        {"pictures": 0},
        {"picture_guidance": -1},
        {"captions": ()},
        {"captions": "a photo of {}"},
        {"captions": ("a photo of {}", "a photo")},
        {"tokens": 0},
        {"insertion": "infix"},
        {"initialization": "uniform"},
        {"initial_word": ""},
        {"checks": 0},
        {"steps_per_check": 0},
        {"pictures_per_step": 0},
        {"learning_rate": 0},
        {"weight_decay": -0.1},
        {"batch_size": 0},
        {"readable": True},
    ],
)
def test_fields_out_of_range_are_refused(field: dict) -> None:
    with pytest.raises(ValidationError):
        TextualInversion(**{**SMALL, **field})


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("concept.pairs=null", r"attack.pairs: pairs is None; it must be a CSV file .* of a concept names it\.$"),
        ("attack.captions=[a photo]", r"attack.captions: captions is \['a photo'\]; .* a list of texts with \{\}"),
    ],
)
def test_what_a_job_lacks_is_one_sentence(monkeypatch: pytest.MonkeyPatch, setting: str, sentence: str) -> None:
    monkeypatch.chdir(CONFIG_FOLDER.parent)
    with pytest.raises(CommandError, match=f"^{sentence}"):
        make_job("attack=textual_inversion", setting, "tracker=off")


@pytest.mark.parametrize("kind", ["style", "object", "unsafe"])
@pytest.mark.parametrize("family", ["canvas", "sd"])
def test_config_instantiates_and_names_every_field(family: str, kind: str, name: str = "textual_inversion") -> None:
    path = CONFIG_FOLDER.parent / "prompts/canvas/fire_pairs.csv"
    config = method_config("attack", name, concept={"kind": kind, "pairs": str(path)}, model={"family": family})
    attack = instantiate(config, _convert_="all")
    assert set(config) - {"_target_"} == {field.name for field in dataclasses.fields(attack)}
    assert attack.seed == 7
    assert attack.pairs == Path(path)
