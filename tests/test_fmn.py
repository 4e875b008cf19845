"""Forget-Me-Not against its formula, whatever the batch; where a concept's tokens are; cost, resumption and effect."""

import dataclasses

import pytest
import torch

from diffusion.loading import load_model
from diffusion.streams import stream
from erasure import finetuning
from erasure.attention import concept_columns, recorded_attention
from erasure.concept import Concept
from erasure.erasers.fmn import FMN, FMNObjective
from erasure.parameters import scope_parameters
from erasure.pruning.learned import Learned
from erasure.pruning.off import Off
from tests.canvas_effect import effect_on_canvas
from tests.erasures import assert_same_erasure
from tests.oracles import fmn as oracle
from tests.tiny_job import CONFIG_FOLDER, make_job

CONCEPT = Concept(
    "van_gogh",
    "style",
    targets=("van gogh style", "by vincent"),
    anchor="a picture",
    templates=("{}", "a church, {}"),
    preserved=("a fish",),
)


def make(**changes):
    return FMN(**{"scope": "xattn", "steps": 4, "batch_size": 3, "images": 4, "sampling_steps": 2, **changes})


@torch.no_grad()
@pytest.mark.parametrize("end_tokens", [False, True])
@pytest.mark.parametrize("norm", ["joint", "layers"])
def test_loss_is_the_papers_formula_for_every_sample_of_a_batch(tiny_model64, norm, end_tokens):
    objective = FMNObjective(make(norm=norm, end_tokens=end_tokens))
    objective.prepare(tiny_model64, CONCEPT, scope="xattn", steps=4, seed=3, checkpoint=None)

    for step in range(2):
        generator = stream(3, "fmn/training", step)
        picks = torch.randint(4, (3,), generator=generator).tolist()
        timesteps = torch.randint(1000, (3,), generator=generator).tolist()
        noise = torch.randn((3, 4, 8, 8), generator=generator).double()
        rows = []
        for place, (pick, t) in enumerate(zip(picks, timesteps, strict=True)):
            prompt = CONCEPT.target_prompts[pick]
            alpha = tiny_model64.process.alphas[t].item()
            x_t = alpha**0.5 * objective._pictures.latents[pick] + (1 - alpha) ** 0.5 * noise[place]
            end = len(tiny_model64.tokenizer(prompt).input_ids) - 1
            start = end - len(tiny_model64.tokenizer(CONCEPT.targets[pick // 2], add_special_tokens=False).input_ids)
            tokens = list(range(start, tiny_model64.max_tokens if end_tokens else end))
            rows.append((x_t, t, tiny_model64.encode([prompt])[0], tokens))

        loss = objective.loss(tiny_model64, step).item()

        assert loss == pytest.approx(oracle.loss(tiny_model64.network, rows, norm), rel=1e-6)


def test_recording_attention_changes_nothing_and_leaves_nothing_behind(tiny_model):
    text = tiny_model.encode(["a church", "a fish"])
    latents = tiny_model.initial_latents([0, 1])
    undisturbed = tiny_model.predict(latents, 500, text)

    with recorded_attention(tiny_model) as attention:
        recorded = tiny_model.predict(latents, 500, text)
    maps = list(attention.probabilities())
    tiny_model.predict(latents, 500, text)

    assert torch.equal(recorded, undisturbed)
    layers = [name for name, _ in tiny_model.network.named_modules() if name.endswith(".attn2")]
    assert len(maps) == len(layers) == len(list(attention.probabilities()))
    assert not any(module._forward_hooks for module in tiny_model.network.modules())
    for probabilities in maps:
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(probabilities.shape[:-1]))


@pytest.mark.parametrize(
    ("target", "template", "marked"),
    [
        ("a church", "{}", ["a church"]),
        ("a church", "a photo of {}, photorealistic", ["a church"]),
        ("van gogh", "a van gogh painting like {}", ["van gogh"]),
        ("a church", "{} beside {}", ["a church", "a church"]),
    ],
)
def test_columns_are_the_targets_own_tokens_in_its_template(tiny_model, target, template, marked):
    concept = Concept("c", "object", targets=(target,), templates=(template,))
    prompt = concept.target_prompts[0]

    columns = concept_columns(tiny_model, concept)[0]

    ids = tiny_model.tokenize([prompt])[0]
    assert tiny_model.tokenizer.decode(ids[columns]).split() == " ".join(marked).split()
    first_token_after = len(tiny_model.tokenizer(prompt[: prompt.rindex(target)]).input_ids) - 1
    assert columns[first_token_after]


def test_end_tokens_add_the_end_and_what_follows_it(tiny_model):
    without = concept_columns(tiny_model, CONCEPT)
    with_end = concept_columns(tiny_model, CONCEPT, end_tokens=True)

    for row, (prompt, before) in enumerate(zip(CONCEPT.target_prompts, without, strict=True)):
        end = len(tiny_model.tokenizer(prompt).input_ids) - 1
        assert not before[end:].any()
        assert with_end[row, end:].all()
        assert torch.equal(with_end[row, :end], before[:end])


def test_a_target_beyond_the_text_encoders_reach_is_refused(tiny_model):
    concept = dataclasses.replace(CONCEPT, templates=("a " * 30 + "{}",))

    with pytest.raises(ValueError, match=r"lies beyond the 24 tokens that 'tiny' reads; shorten the template"):
        make().erase(tiny_model, concept, Off(), seed=0)


@pytest.mark.parametrize("retain_weight", [0.0, 1.0])
def test_cost_is_exactly_the_formulas(tiny_model, retain_weight):
    eraser = make(retain_weight=retain_weight, retain_trajectories=5, retain_batch_size=2)
    erasure = eraser.erase(tiny_model, CONCEPT, Off(), seed=0)

    pictures, training, retained = 4 * 2 * 2, 4 * 3, 5 * 2 * 2 + 4 * 2
    expected = pictures + training + (retained if retain_weight else 0)
    assert erasure.unet_evaluations == tiny_model.unet_evaluations == expected
    assert set(erasure.edit.entries) <= set(scope_parameters(tiny_model, "xattn"))


def test_training_takes_attention_away_from_the_concept(tiny_model):
    losses = make(steps=30, learning_rate=1e-2).erase(tiny_model, CONCEPT, Off(), seed=0).losses

    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize("pruning", [Off(), Learned(steps=4, scope=None)], ids=["off", "learned"])
def test_killed_training_resumes_to_the_same_edit_bit_for_bit(tiny_model, tmp_path, monkeypatch, pruning):
    monkeypatch.setattr(finetuning, "CHECKPOINT_EVERY", 2)
    eraser = make(retain_weight=0.5, retain_trajectories=2)
    undisturbed = eraser.erase(tiny_model, CONCEPT, pruning, seed=1)
    loss = FMNObjective.loss

    def dying_loss(self, model, step):
        if step == 3:
            raise RuntimeError("killed")
        return loss(self, model, step)

    monkeypatch.setattr(FMNObjective, "loss", dying_loss)
    with pytest.raises(RuntimeError, match="killed"):
        eraser.erase(tiny_model, CONCEPT, pruning, seed=1, checkpoint=tmp_path / "work")
    monkeypatch.setattr(FMNObjective, "loss", loss)
    before = tiny_model.unet_evaluations
    resumed = eraser.erase(tiny_model, CONCEPT, pruning, seed=1, checkpoint=tmp_path / "work")

    assert_same_erasure(resumed, undisturbed)
    assert tiny_model.unet_evaluations - before < undisturbed.unet_evaluations


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "frobenius"}, "'joint' or 'layers'"),
        ({"images": 0}, "greater than or equal to 1"),
        ({"retain_weight": -1.0}, "greater than or equal to 0"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_loaded(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


@torch.backends.mkldnn.flags(enabled=True)
def test_a_short_run_takes_the_canvas_eyes_off_the_concept(monkeypatch):
    monkeypatch.chdir(CONFIG_FOLDER.parent)
    shortened = ["images=8", "sampling_steps=4", "steps=40", "retain_weight=0", "learning_rate=1e-3"]
    job = make_job("concept=church", "eraser=fmn", *(f"eraser.{part}" for part in shortened))

    losses = job.eraser.erase(load_model("canvas"), job.concept, job.pruning, seed=0).losses

    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


@pytest.mark.slow
def test_the_church_goes_from_the_canvas_and_the_rest_stays(monkeypatch):
    monkeypatch.chdir(CONFIG_FOLDER.parent)

    shown, kept = effect_on_canvas("church", "eraser=fmn", prompts=24, retained=48)

    assert shown <= 0.5
    assert kept >= 0.8
