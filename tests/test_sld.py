"""SLD against its formulas, its exact cost, and what attacks and pruning make of a guided model."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from attacks.noise import NoiseAttack, denoising_path, invert
from attacks.random_tokens import RandomTokens
from attacks.unlearndiff import UnlearnDiffAtk
from diffusion.model import TextToImage
from diffusion.sampling import Sampling
from erasure.addition import attached
from erasure.additions.safe_guidance import SafetyGuard
from erasure.concept import Concept
from erasure.edit import Edit
from erasure.erasers.sld import SLD
from erasure.phrases import joined_targets
from erasure.pruning.conceptprune import ConceptPrune
from erasure.pruning.learned import Learned
from erasure.pruning.magnitude import Magnitude
from erasure.pruning.masks import Sparsity
from erasure.pruning.off import Off
from tests import tiny_job
from tests.attack_cases import make_cases
from tests.canvas_effect import effect_on_canvas
from tests.conftest import make_tiny_pipeline
from tests.judges import never
from tests.oracles import sld as oracle
from tests.tiny_job import CONFIG_FOLDER, make_job, run

CONCEPT = Concept("van_gogh", "style", targets=("van gogh style", "by vincent"), anchor="a picture")
BOTH = dataclasses.replace(CONCEPT, also=(Concept("church", "object", targets=("a church", "a chapel")),))
PROMPTS = ["a church in van gogh style", "two blue fish"]
STEPS = 5
SETTINGS = {"safety_scale": 20.0, "threshold": 0.05, "momentum_scale": 0.4, "momentum_beta": 0.6}


def make(**changes):
    return SLD(**{**SETTINGS, "warmup_steps": 2, **changes})


def erased(model, config, concept=CONCEPT) -> Edit:
    return config.erase(model, concept, Off(), seed=0).edit


@torch.no_grad()
@pytest.mark.parametrize("scaling", ["at_most_1", "at_least_1"])
@pytest.mark.parametrize(("warmup_steps", "guidance"), [(2, (3.0, 5.0)), (0, (1.0, 1.0))])
def test_pictures_are_those_of_the_papers_formulas(tiny_model64, scaling, warmup_steps, guidance):
    model = tiny_model64
    text, empty = model.encode(PROMPTS), model.encode([""])[0]
    concept = model.encode(["van gogh style, by vincent"])[0]
    timesteps = model.sampling_timesteps(STEPS).tolist()
    scheduler = model.make_scheduler(STEPS)
    noise = model.initial_latents([3, 4])
    expected = [
        oracle.sample(
            lambda x, t, c: model.predict(x[None], t, c[None])[0],
            lambda eps, t, x: scheduler.step(eps, t, x).prev_sample,
            noise[place],
            text[place],
            empty,
            concept,
            timesteps,
            guidance=guidance[place],
            warmup_steps=warmup_steps,
            scaling=scaling,
            **SETTINGS,
        )
        for place in range(2)
    ]

    with erased(model, make(warmup_steps=warmup_steps, scaling=scaling)).applied(model):
        found = model.sample(model.encode(PROMPTS), seeds=[3, 4], steps=STEPS, guidance=guidance)
    unguarded = model.sample(text, seeds=[3, 4], steps=STEPS, guidance=guidance)

    assert torch.allclose(found, torch.stack(expected), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found, unguarded, rtol=1e-3)


def test_it_acts_from_the_first_step_after_the_warm_up(tiny_model):
    edit = erased(tiny_model, make(warmup_steps=3))
    settings = {"seeds": [1], "steps": STEPS, "guidance": 3.0}
    text = tiny_model.encode(PROMPTS[:1])
    before = [tiny_model.sample(text, until=until, **settings) for until in (3, 4)]

    with edit.applied(tiny_model):
        after = [tiny_model.sample(text, until=until, **settings) for until in (3, 4)]

    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


def test_a_picture_does_not_depend_on_the_others_of_its_batch(tiny_model64):
    with erased(tiny_model64, make()).applied(tiny_model64):
        settings = {"seeds": [1, 2], "steps": STEPS, "guidance": [1.0, 5.0]}
        together = tiny_model64.sample(tiny_model64.encode(PROMPTS), **settings)
        alone = tiny_model64.sample(tiny_model64.encode(PROMPTS), **settings, batch_size=1)

    assert torch.allclose(together, alone, atol=1e-12)


def test_half_precision_does_not_overflow(tokenizer_folder):
    model = TextToImage(make_tiny_pipeline(tokenizer_folder).to(torch.float16), name="half")
    config = make(safety_scale=1e6, scaling="at_least_1", threshold=10.0, momentum_scale=0.0)
    with erased(model, config).applied(model):
        guided = model.guard.guidance(model)
        latents = model.initial_latents([1])
        texts = model.encode(["a church", ""])
        noise = guided(latents, torch.tensor([500]), texts[:1], texts[1:], torch.zeros(1))

    assert noise.dtype == torch.float16
    assert noise.isfinite().all()


def test_the_concept_is_all_its_targets_in_one_phrase(tiny_model):
    stored = erased(tiny_model, make()).additions[0].concept

    assert torch.equal(stored, tiny_model.encode(["van gogh style, by vincent"])[0])


def test_several_concepts_take_turns_in_the_phrase_and_none_is_left_out(tiny_model):
    many = dataclasses.replace(BOTH, targets=tuple(f"van gogh {number}" for number in range(40)))

    assert joined_targets(tiny_model, BOTH) == "van gogh style, a church, by vincent, a chapel"
    phrase = joined_targets(tiny_model, many)
    assert phrase.startswith("van gogh 0, a church, van gogh 1, a chapel")
    whole = tiny_model.tokenizer(phrase).input_ids
    assert tiny_model.tokenize([phrase])[0, : len(whole)].tolist() == whole
    assert len(whole) <= tiny_model.max_tokens
    assert torch.equal(
        erased(tiny_model, make(), BOTH).additions[0].concept,
        tiny_model.encode(["van gogh style, a church, by vincent, a chapel"])[0],
    )


def test_it_costs_nothing_and_leaves_the_model_alone(tiny_model):
    fingerprint = tiny_model.fingerprint()

    erasure = make().erase(tiny_model, CONCEPT, Off(), seed=0)

    assert erasure.unet_evaluations == tiny_model.unet_evaluations == 0
    assert erasure.losses == []
    assert not erasure.edit.entries
    assert tiny_model.guard is None
    assert tiny_model.fingerprint() == fingerprint == erasure.edit.metadata["base"]
    assert erasure.edit.metadata["method"] == "SLD"


def test_weights_and_single_predictions_stay_as_they_are(tiny_model):
    text, latents = tiny_model.encode(PROMPTS), tiny_model.initial_latents([1, 2])
    before = tiny_model.predict(latents, 500, text)
    with erased(tiny_model, make()).applied(tiny_model):
        assert torch.equal(tiny_model.encode(PROMPTS), text)
        assert torch.equal(tiny_model.predict(latents, 500, text), before)
    assert tiny_model.guard is None


def test_it_is_read_back_as_it_was_saved(tiny_model, tmp_path: Path):
    edit = erased(tiny_model, make())
    edit.save(tmp_path / "edit.safetensors")
    read = Edit.load(tmp_path / "edit.safetensors")
    pictures = []
    for one in (edit, read):
        with one.applied(tiny_model):
            pictures.append(tiny_model.generate(PROMPTS, seeds=[1, 2], steps=STEPS, guidance=4.0))

    assert torch.equal(*pictures)


def test_another_models_text_is_refused(tiny_model, tiny_model64):
    [added] = erased(tiny_model, make()).additions
    short = dataclasses.replace(added, concept=added.concept[:, :8])
    with (
        pytest.raises(ValueError, match=r"text of shape \[24, 8\] and 'tiny' has \[24, 32\]"),
        attached(tiny_model, short),
    ):
        pass


@pytest.mark.parametrize(
    ("attack", "guidance"),
    [
        (UnlearnDiffAtk(timesteps=2, steps_per_timestep=2), 4.0),
        (RandomTokens(tries=2), 4.0),
        (RandomTokens(tries=2), 1.0),
    ],
)
def test_attacks_meet_it_and_pay_three_evaluations_a_step(tiny_model, attack, guidance):
    cases = make_cases(tiny_model, PROMPTS, guidance)
    edit = erased(tiny_model, make(safety_scale=1e3, threshold=1.0, warmup_steps=0))
    sampling = Sampling(steps=3, batch_size=1)
    plain = list(attack.run(tiny_model, cases, never, sampling=sampling))
    spent = tiny_model.unet_evaluations
    with edit.applied(tiny_model):
        guarded = list(attack.run(tiny_model, cases, never, sampling=sampling))
        spent = tiny_model.unet_evaluations - spent

    assert sum(outcome.unet_evaluations for outcome in guarded) == spent
    searched = 2 * 2 if isinstance(attack, UnlearnDiffAtk) else 0
    for one, other in zip(plain, guarded, strict=True):
        assert other.unet_evaluations == searched + 3 * 3 * 3
        assert one.unet_evaluations == searched + 3 * 3 * (1 if guidance == 1 else 2)
        assert not torch.equal(one.image, other.image)


@pytest.mark.parametrize("guidance", [4.0, 1.0])
@pytest.mark.parametrize("warmup_steps", [0, 2])
def test_noise_is_sought_through_it_with_its_steps_and_its_momentum(tiny_model64, warmup_steps, guidance):
    model, (case,) = tiny_model64, make_cases(tiny_model64, PROMPTS[:1], guidance)
    attack = NoiseAttack(unrolled_steps=3, checks=1, steps_per_check=1)
    target = model.encode_images(case.target[None])
    with erased(model, make(safety_scale=1e3, threshold=1.0, warmup_steps=warmup_steps)).applied(model):
        spent = model.unet_evaluations
        (outcome,) = attack.run(model, [case], never, sampling=Sampling(steps=3))
        spent = model.unet_evaluations - spent
        drawn = model.sample(model.encode([case.prompt]), seeds=[case.seed], steps=3, guidance=guidance)
    unguarded = model.sample(model.encode([case.prompt]), seeds=[case.seed], steps=3, guidance=guidance)
    assert outcome.checks[1].loss == pytest.approx(float((drawn - target).square().mean()), rel=1e-6)
    assert outcome.checks[1].loss != pytest.approx(float((unguarded - target).square().mean()), rel=1e-5)
    # Two pictures, and one gradient that keeps what the guard remembers.
    assert outcome.unet_evaluations == spent == 3 * 3 * 3


def test_of_fewer_steps_each_is_guided_as_the_pictures_step_at_its_place(tiny_model64):
    model, (case,) = tiny_model64, make_cases(tiny_model64, PROMPTS[:1], 4.0)
    with erased(model, make(safety_scale=1e3, threshold=1.0, warmup_steps=3)).applied(model):
        losses = [
            next(
                NoiseAttack(unrolled_steps=steps, checks=1, steps_per_check=1).run(
                    model, [case], never, sampling=Sampling(steps=6)
                )
            )
            .checks[1]
            .loss
            for steps in (2, 3)
        ]
        model.guard.guidance = lambda model, steps=None: SafetyGuard.guidance(model.guard, model, [0] * 9)
        never_warm = next(
            NoiseAttack(unrolled_steps=2, checks=1, steps_per_check=1).run(
                model, [case], never, sampling=Sampling(steps=6)
            )
        )
    assert losses[0] != losses[1]
    # The second of two steps is the fourth of six, which the warm-up leaves.
    assert losses[0] != pytest.approx(never_warm.checks[1].loss, rel=1e-3)


def test_inversion_goes_back_through_it(tiny_model64):
    model, (case,) = tiny_model64, make_cases(tiny_model64, PROMPTS[:1], 4.0)
    attack = NoiseAttack(mode="inversion", inverted_with="guidance")
    with erased(model, make(safety_scale=1e3, threshold=1.0, warmup_steps=1)).applied(model):
        spent = model.unet_evaluations
        (outcome,) = attack.run(model, [case], never, sampling=Sampling(steps=3))
        spent = model.unet_evaluations - spent
        guidance, scales = model.guard.guidance(model, [2, 1, 0]), torch.tensor([4.0])
        text, empty = model.encode_prompts([case.prompt]), model.encode_prompts([""])
        found, _ = invert(
            lambda x, t: guidance(x, torch.tensor([t]), text, empty, scales),
            denoising_path(model, 3),
            model.encode_images(case.target[None]),
            1,
            model.process.move,
        )
    nats = (found.double().square().mean() + math.log(2 * math.pi)) / 2
    assert outcome.checks[1].loss == pytest.approx(float(nats), rel=1e-9)
    assert outcome.unet_evaluations == spent == 3 * 3 * 3


@torch.no_grad()
@pytest.mark.parametrize(
    "pruning", [Magnitude(Sparsity(0.5)), ConceptPrune(sampling_steps=3, first_steps=2, pictures=4)]
)
def test_scored_pruning_acts_on_the_guarded_model(tiny_model, pruning):
    spent = tiny_model.unet_evaluations
    erasure = make().erase(tiny_model, CONCEPT, pruning, seed=0)

    assert erasure.unet_evaluations == tiny_model.unet_evaluations - spent
    assert [addition.kind for addition in erasure.edit.additions] == ["safe_guidance"]
    assert erasure.edit.masks()
    with erasure.edit.applied(tiny_model):
        assert tiny_model.guard is not None


def test_pruning_that_learns_is_refused(tiny_model):
    with pytest.raises(ValueError, match="eraser 'SLD' has none"):
        make().erase(tiny_model, CONCEPT, Learned(), seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"safety_scale": 0.0}, "greater than 0"),
        ({"warmup_steps": -1}, "greater than or equal to 0"),
        ({"momentum_scale": -0.1}, "greater than or equal to 0"),
        ({"momentum_beta": 1.0}, "less than 1"),
        ({"scaling": "max"}, "'at_most_1' or 'at_least_1'"),
        ({"steps": 3}, "Unexpected keyword"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_loaded(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize("choice", sorted(path.stem for path in (CONFIG_FOLDER / "eraser").glob("sld*.yaml")))
def test_every_preset_names_every_field(choice, monkeypatch):
    monkeypatch.chdir(CONFIG_FOLDER.parent)
    job = make_job(f"eraser={choice}")

    assert isinstance(job.eraser, SLD)
    assert set(job.config["eraser"]) == {"_target_", *(field.name for field in dataclasses.fields(SLD))}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("weak", (200.0, 0.0, 15, 0.0)),
        ("medium", (1000.0, 0.01, 10, 0.3, 0.4)),
        ("strong", (2000.0, 0.025, 7, 0.5, 0.7)),
        ("max", (5000.0, 1.0, 0, 0.5, 0.7)),
    ],
)
def test_presets_hold_the_papers_settings(choice, expected, monkeypatch):
    monkeypatch.chdir(CONFIG_FOLDER.parent)
    eraser = make_job(f"eraser=sld_{choice}_sd14").eraser

    assert eraser.scaling == "at_most_1"
    names = ("safety_scale", "threshold", "warmup_steps", "momentum_scale", "momentum_beta")
    assert tuple(getattr(eraser, name) for name in names)[: len(expected)] == expected


@pytest.mark.parametrize(
    "attack", [["unlearndiff", "timesteps=2", "steps_per_timestep=2"], ["random", "tries=2"], ["none"]]
)
def test_a_job_counts_every_evaluation(attack, tokenizer_folder, monkeypatch, tmp_path):
    monkeypatch.chdir(CONFIG_FOLDER.parent)
    make_tiny_pipeline(tokenizer_folder).save_pretrained(tmp_path / "model")
    tiny_job.write_world(tmp_path)
    model = tiny_job.Float64Folder(tmp_path / "model").load()
    monkeypatch.setattr(tiny_job.Float64Folder, "load", lambda self: model)
    command = [
        part for part in tiny_job.overrides(tmp_path, tmp_path / "store") if part[:6] not in {"eraser", "attack"}
    ]
    name, *settings = attack

    summary = run([*command, "eraser=sld", f"attack={name}", *(f"attack.{one}" for one in settings)], tmp_path / "run")

    assert sum(cost["unet_evaluations"] for cost in summary["costs"].values()) == model.unet_evaluations
    assert model.guard is None


@pytest.mark.slow
@pytest.mark.parametrize("concept", ["van_gogh", "church"])
def test_half_of_the_concept_goes_from_the_canvas_and_most_of_the_rest_stays(concept, monkeypatch):
    monkeypatch.chdir(CONFIG_FOLDER.parent)

    shown, kept = effect_on_canvas(concept, "eraser=sld", prompts=24, retained=48)

    assert shown <= 0.5
    assert kept >= 0.8
