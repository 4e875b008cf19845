"""SalUn against its formulas, ties included; what the mask leaves alone; cost, resumption and effect."""

import dataclasses
import math

import pytest
import torch

from diffusion.streams import stream
from erasure import finetuning
from erasure.concept import Concept
from erasure.erasers import salun
from erasure.erasers.salun import SalUn, SalUnObjective
from erasure.parameters import scope_parameters
from erasure.pruning.learned import Learned
from erasure.pruning.masks import cut_lowest
from erasure.pruning.off import Off
from tests.canvas_effect import effect_on_canvas
from tests.erasures import assert_same_erasure
from tests.night import nightly
from tests.oracles import salun as oracle
from tests.tiny_job import CONFIG_FOLDER

CONCEPT = Concept(
    "van_gogh",
    "style",
    targets=("van gogh style", "by vincent"),
    anchor="a picture",
    templates=("{}", "a church, {}"),
    preserved=("a fish", "a parachute"),
)


def make(**changes):
    small = {
        "scope": "xattn",
        "trained_fraction": 0.3,
        "steps": 4,
        "batch_size": 2,
        "images": 5,
        "retain_images": 3,
        "sampling_steps": 2,
    }
    return SalUn(**{**small, **changes})


def prepared(model, config, seed=3, scope="xattn"):
    objective = SalUnObjective(config)
    objective.prepare(model, CONCEPT, scope=scope, steps=4, seed=seed, checkpoint=None)
    return objective


def flat(tensors):
    return [value for tensor in tensors.values() for value in tensor.flatten().tolist()]


def draws(generator, picks):
    """Timesteps and noise for so many pictures."""
    timesteps = torch.randint(1000, (len(picks),), generator=generator).tolist()
    return timesteps, torch.randn((len(picks), 4, 8, 8), generator=generator).double()


@pytest.mark.parametrize("guidance", [8.5, 1.0])
def test_mask_is_the_largest_gradients_of_the_forgetting_loss(tiny_model64, monkeypatch, guidance):
    saliencies = {}

    def watched(scores, count):
        saliencies.update(scores)
        return cut_lowest(scores, count)

    monkeypatch.setattr(salun, "cut_lowest", watched)
    objective = prepared(tiny_model64, make(saliency_guidance=guidance))
    empty = tiny_model64.encode([""])[0]
    rows = []
    for number, picks in enumerate(([0, 1], [2, 3], [4])):
        timesteps, noise = draws(stream(3, "salun/saliency", number), picks)
        for pick, t, eps in zip(picks, timesteps, noise, strict=True):
            text = tiny_model64.encode([CONCEPT.target_prompts[pick % 4]])[0]
            rows.append((objective._forgotten.latents[pick], eps, t, text, empty))
    names = list(scope_parameters(tiny_model64, "xattn"))

    expected = oracle.saliency(tiny_model64.network, names, tiny_model64.process.alphas.tolist(), rows, guidance)

    assert list(objective._masks) == names
    assert flat(saliencies) == pytest.approx(expected, rel=1e-6, abs=1e-6 * max(expected))
    assert flat(objective._masks) == oracle.mask(flat(saliencies), 0.3)
    assert sum(flat(objective._masks)) == math.floor(0.3 * len(expected))


def test_of_equal_saliencies_the_later_weights_are_trained():
    values = {"a": torch.tensor([[2.0, 1.0], [1.0, 0.0]]), "b": torch.tensor([1.0, 1.0, 3.0])}

    for trained in range(8):
        assert flat(cut_lowest(values, 7 - trained)) == oracle.mask(flat(values), trained / 7 + 1e-9)


@pytest.mark.parametrize("retain_weight", [0.5, 0.0])
def test_loss_is_the_papers_formula(tiny_model64, retain_weight):
    objective = prepared(tiny_model64, make(retain_weight=retain_weight))
    with torch.no_grad():
        for weight in scope_parameters(tiny_model64, "xattn").values():
            weight.mul_(1.2)

        for step in range(2):
            generator = stream(3, "salun/training", step)
            picks = torch.randint(5, (2,), generator=generator).tolist()
            forgotten, retained = [], []
            timesteps, noise = draws(generator, picks)
            for pick, t, eps in zip(picks, timesteps, noise, strict=True):
                prompts = [CONCEPT.target_prompts[pick % 4], CONCEPT.target_anchors[pick % 4]]
                texts = [tiny_model64.encode([prompt])[0] for prompt in prompts]
                forgotten.append((objective._forgotten.latents[pick], eps, t, *texts))
            if retain_weight:
                picks = torch.randint(3, (2,), generator=generator).tolist()
                timesteps, noise = draws(generator, picks)
                for pick, t, eps in zip(picks, timesteps, noise, strict=True):
                    text = tiny_model64.encode([CONCEPT.preserved_prompts[pick % 2]])[0]
                    retained.append((objective._retained.latents[pick], eps, t, text, text))

            alphas = tiny_model64.process.alphas.tolist()
            expected = oracle.loss(tiny_model64.network, alphas, forgotten, retained, retain_weight)
            assert objective.loss(tiny_model64, step).item() == pytest.approx(expected, rel=1e-6)


def test_gradient_stops_at_the_anchors_prediction_and_at_the_mask(tiny_model64):
    objective = prepared(tiny_model64, make(retain_weight=0.0))
    parameters = scope_parameters(tiny_model64, "xattn")
    objective._anchors = objective._targets

    with tiny_model64.trainable(list(parameters.values())):
        same = objective.loss(tiny_model64, 0)
        assert same.item() == pytest.approx(0, abs=1e-20)
        objective._anchors = objective._targets.flip(0)
        objective.loss(tiny_model64, 0).backward()
        for name, weight in parameters.items():
            assert torch.equal(weight.grad[~objective._masks[name]], torch.zeros_like(weight)[~objective._masks[name]])
        assert any(weight.grad[objective._masks[name]].abs().sum() > 0 for name, weight in parameters.items())


def test_weights_outside_the_mask_stay_bit_for_bit_and_those_inside_move(tiny_model):
    base = {name: weight.clone() for name, weight in scope_parameters(tiny_model, "xattn").items()}
    fingerprint = tiny_model.fingerprint()
    masks = prepared(tiny_model, make(learning_rate=1e-2))._masks

    edit = make(learning_rate=1e-2).erase(tiny_model, CONCEPT, Off(), seed=3).edit

    assert tiny_model.fingerprint() == fingerprint
    with edit.applied(tiny_model):
        moved = 0
        for name, weight in scope_parameters(tiny_model, "xattn").items():
            assert torch.equal(weight[~masks[name]], base[name][~masks[name]])
            moved += int((weight != base[name]).sum())
    assert moved > 0.9 * sum(flat(masks))


def test_learned_pruning_takes_salient_weights_only(tiny_model):
    masks = prepared(tiny_model, make(), scope="xattn")._masks

    pruned = make().erase(tiny_model, CONCEPT, Learned(steps=8, scope=None, learning_rate=0.5), seed=3).edit.masks()

    assert sum(int((~kept).sum()) for kept in pruned.values()) > 0
    for name, kept in pruned.items():
        assert not (~kept & ~masks[name]).any()


@pytest.mark.parametrize("changes", [{}, {"retain_weight": 0.0}, {"saliency_guidance": 1.0}], ids=str)
def test_cost_is_exactly_the_formulas(tiny_model, changes):
    config = make(**changes)
    erasure = config.erase(tiny_model, CONCEPT, Off(), seed=0)

    pictures = 2 * 2 * (5 + (3 if config.retain_weight else 0))
    saliency = 5 * (1 if config.saliency_guidance == 1 else 2)
    training = 4 * 2 * (3 if config.retain_weight else 2)
    assert erasure.unet_evaluations == tiny_model.unet_evaluations == pictures + saliency + training


def test_pictures_do_not_depend_on_how_many_are_sampled_at_a_time(tiny_model64):
    one, other = (prepared(tiny_model64, make(sampling_batch_size=size)) for size in (1, 64))

    for kind in ("_forgotten", "_retained"):
        torch.testing.assert_close(getattr(one, kind).latents, getattr(other, kind).latents, rtol=0, atol=1e-10)
        assert torch.equal(getattr(one, kind).prompts, getattr(other, kind).prompts)


@pytest.mark.parametrize("killed_in", ["pictures", nightly("saliency"), "training"])
@pytest.mark.parametrize("pruning", [Off(), nightly(Learned(steps=4, scope=None))], ids=["off", "learned"])
def test_killed_erasing_resumes_to_the_same_edit_bit_for_bit(tiny_model, tmp_path, monkeypatch, pruning, killed_in):
    monkeypatch.setattr(finetuning, "CHECKPOINT_EVERY", 2)
    eraser = make(sampling_batch_size=2)
    undisturbed = eraser.erase(tiny_model, CONCEPT, pruning, seed=1)
    owner, name, dying_at = {
        "pictures": (tiny_model, "sample", 2),
        "saliency": (SalUnObjective, "_salient", 1),
        "training": (SalUnObjective, "loss", 4),
    }[killed_in]
    original = getattr(owner, name)
    calls = 0

    def dying(*arguments, **named):
        nonlocal calls
        calls += 1
        if calls == dying_at:
            raise RuntimeError("killed")
        return original(*arguments, **named)

    monkeypatch.setattr(owner, name, dying)
    with pytest.raises(RuntimeError, match="killed"):
        eraser.erase(tiny_model, CONCEPT, pruning, seed=1, checkpoint=tmp_path / "work")
    monkeypatch.setattr(owner, name, original)
    before = tiny_model.unet_evaluations
    resumed = eraser.erase(tiny_model, CONCEPT, pruning, seed=1, checkpoint=tmp_path / "work")

    assert_same_erasure(resumed, undisturbed)
    assert tiny_model.unet_evaluations - before < undisturbed.unet_evaluations


def test_retain_term_without_preserved_phrases_is_refused_before_any_picture_is_made(tiny_model):
    concept = dataclasses.replace(CONCEPT, preserved=())

    with pytest.raises(ValueError, match="names no preserved phrases"):
        make().erase(tiny_model, concept, Off(), seed=0)
    assert tiny_model.unet_evaluations == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trained_fraction": 0.0}, "greater than 0"),
        ({"trained_fraction": 1.5}, "less than or equal to 1"),
        ({"retain_weight": -0.5}, "greater than or equal to 0"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_loaded(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.slow
def test_a_short_run_takes_the_style_from_the_canvas_and_the_rest_stays(monkeypatch):
    monkeypatch.chdir(CONFIG_FOLDER.parent)
    shortened = ["images=12", "retain_images=32", "sampling_steps=8", "steps=24", "batch_size=4", "retain_weight=1"]
    command = [f"eraser.{part}" for part in [*shortened, "learning_rate=5e-4"]]

    shown, kept = effect_on_canvas("van_gogh", "eraser=salun", *command, prompts=8, retained=8, steps=10)

    assert shown <= 0.5
    assert kept >= 0.8


@pytest.mark.slow
@pytest.mark.parametrize("concept", ["van_gogh", "church"])
def test_the_concept_goes_from_the_canvas_and_the_rest_stays(monkeypatch, concept):
    monkeypatch.chdir(CONFIG_FOLDER.parent)

    shown, kept = effect_on_canvas(concept, "eraser=salun", prompts=24, retained=48)

    assert shown <= 0.5
    assert kept >= 0.8
