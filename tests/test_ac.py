"""Concept ablation against its formula, its exact cost, and its resumption."""

import dataclasses
from pathlib import Path

import pytest
import torch

from diffusion.model import TextToImage
from diffusion.parameters import named_parameters
from diffusion.streams import stream
from erasure import finetuning
from erasure.concept import Concept
from erasure.erasers.ac import AC, ACObjective, first_token_detached, target_token_rows
from erasure.parameters import scope_parameters
from erasure.pruning.learned import Learned
from erasure.pruning.magnitude import Magnitude
from erasure.pruning.masks import Sparsity
from erasure.pruning.off import Off
from experiments.job.settings import TRAINING_SPEED_ONLY, matters
from tests.conftest import make_tiny_pipeline
from tests.erasures import assert_same_erasure
from tests.night import nightly
from tests.oracles import ac as oracle
from tests.tiny_job import make_job

TEMPLATES = ("{}", "a church, {}")
CONCEPT = Concept(
    "van_gogh",
    "style",
    targets=("van gogh style", "by vincent"),
    anchor="a picture",
    templates=TEMPLATES,
    preserved=("a fish",),
)


def make(**changes):
    return AC(**{"steps": 4, "batch_size": 2, "images": 3, "sampling_steps": 2, **changes})


def drawn(step, images):
    """Pictures, timesteps and noise of a step, and of its prior term."""
    generator = stream(3, "ac/training", step)
    for _ in range(2):
        picks = torch.randint(images, (2,), generator=generator).tolist()
        timesteps = torch.randint(1000, (2,), generator=generator).tolist()
        yield picks, timesteps, torch.randn((2, 4, 8, 8), generator=generator).double()


@torch.no_grad()
@pytest.mark.parametrize("prior_weight", [0.0, 0.7])
@pytest.mark.parametrize("variant", ["model", "noise"])
def test_loss_is_the_papers_formula(tiny_model64, variant, prior_weight):
    objective = ACObjective(make(variant=variant, prior_weight=prior_weight))
    objective.prepare(tiny_model64, CONCEPT, scope="xattn_kv", steps=4, seed=3, checkpoint=None)
    for weight in scope_parameters(tiny_model64, "xattn").values():
        weight.mul_(1.2)
    pictures, alphas = objective._pictures.latents, tiny_model64.process.alphas.tolist()

    for step in range(2):
        (picks, timesteps, noise), (others, other_timesteps, other_noise) = drawn(step, 3)
        rows = []
        for place, (pick, t) in enumerate(zip(picks, timesteps, strict=True)):
            phrases = [CONCEPT.targets[place % 2], CONCEPT.anchor]
            texts = [tiny_model64.encode([TEMPLATES[pick % 2].replace("{}", phrase)])[0] for phrase in phrases]
            rows.append((pictures[pick], noise[place], t, *texts))
        prior = [
            (pictures[pick], other_noise[place], t, tiny_model64.encode([TEMPLATES[pick % 2].format("a picture")])[0])
            for place, (pick, t) in enumerate(zip(others, other_timesteps, strict=True))
        ]

        expected = (
            oracle.loss(tiny_model64.network, alphas, rows)
            if variant == "model"
            else oracle.noise_loss(tiny_model64.network, alphas, [row[:4] for row in rows])
        )
        expected += prior_weight * oracle.noise_loss(tiny_model64.network, alphas, prior)
        assert objective.loss(tiny_model64, step).item() == pytest.approx(expected, rel=1e-5)


CHURCH = Concept("church", "object", targets=("church",), anchor="house", templates=("{}", "a red {}", "big {}"))
BOTH = dataclasses.replace(CONCEPT, also=(CHURCH,))


@torch.no_grad()
def test_several_concepts_take_turns_each_on_pictures_of_its_own_anchor(tiny_model64):
    objective = ACObjective(make(images=4, prior_weight=0.5))
    cost = objective.prepare(tiny_model64, BOTH, scope="xattn_kv", steps=4, seed=3, checkpoint=None)
    alone = [ACObjective(make(images=4)) for _ in range(2)]
    for objective_alone, concept in zip(alone, (CONCEPT, CHURCH), strict=True):
        objective_alone.prepare(tiny_model64, concept, scope="xattn_kv", steps=4, seed=3, checkpoint=None)
    pictures = [objective_alone._pictures.latents for objective_alone in alone]
    for weight in scope_parameters(tiny_model64, "xattn").values():
        weight.mul_(1.2)

    assert cost == 2 * 4 * 2 * 2
    for step in range(3):
        generator = stream(3, "ac/training", step)
        picks = torch.randint(4, (2,), generator=generator).tolist()
        timesteps = torch.randint(1000, (2,), generator=generator).tolist()
        noise = torch.randn((2, 4, 8, 8), generator=generator).double()
        others = torch.randint(8, (2,), generator=generator).tolist()
        other_timesteps = torch.randint(1000, (2,), generator=generator).tolist()
        other_noise = torch.randn((2, 4, 8, 8), generator=generator).double()
        rows, prior = [], []
        for turn, concept in enumerate((CONCEPT, CHURCH)):
            template = concept.templates[picks[turn] % len(concept.templates)]
            phrases = [concept.targets[step % len(concept.targets)], concept.anchor]
            texts = [tiny_model64.encode([template.format(phrase)])[0] for phrase in phrases]
            rows.append((pictures[turn][picks[turn]], noise[turn], timesteps[turn], *texts))
        for place, other in enumerate(others):
            concept, pick = (CONCEPT, CHURCH)[other // 4], other % 4
            prompt = concept.templates[pick % len(concept.templates)].format(concept.anchor)
            text = tiny_model64.encode([prompt])[0]
            prior.append((pictures[other // 4][pick], other_noise[place], other_timesteps[place], text))

        alphas = tiny_model64.process.alphas.tolist()
        expected = oracle.loss(tiny_model64.network, alphas, rows) + 0.5 * oracle.noise_loss(
            tiny_model64.network, alphas, prior
        )
        assert objective.loss(tiny_model64, step).item() == pytest.approx(expected, rel=1e-5)


def test_concepts_of_one_anchor_share_its_pictures(tiny_model):
    also = dataclasses.replace(CONCEPT, name="seurat", targets=("by seurat",))

    erasure = make().erase(tiny_model, dataclasses.replace(CONCEPT, also=(also,)), Off(), seed=0)

    assert erasure.unet_evaluations == tiny_model.unet_evaluations == 3 * 2 * 2 + 4 * 2 * 2


def test_cached_pictures_serve_every_concept_of_their_anchor_and_change_no_result(tiny_model, tmp_path):
    other = dataclasses.replace(CONCEPT, name="seurat", targets=("by seurat",))
    plain = [make(images=70).erase(tiny_model, concept, Off(), seed=0) for concept in (CONCEPT, other)]
    spent = []

    for concept, expected in zip((CONCEPT, other), plain, strict=True):
        before = tiny_model.unet_evaluations
        erasure = make(images=70, cache=tmp_path / "anchors").erase(tiny_model, concept, Off(), seed=0)
        spent.append(tiny_model.unet_evaluations - before)
        assert erasure.losses == expected.losses
        # Their cost counts wherever they are used.
        assert erasure.unet_evaluations == expected.unet_evaluations == 70 * 2 * 2 + 4 * 2 * 2

    assert spent == [70 * 2 * 2 + 4 * 2 * 2, 4 * 2 * 2]
    assert len(list((tmp_path / "anchors").glob("*.pictures"))) == 2


@pytest.mark.parametrize(
    "changes",
    [
        *({"sampling_steps": 3}, nightly({"image_guidance": 2.0}), {"anchor": "a photo"}, nightly({"seed": 1})),
        *({"model": 1}, nightly({"beta_end": 0.02}), nightly({"scaling_factor": 0.5})),
    ],
    ids=str,
)
def test_pictures_of_another_anchor_model_seed_or_sampler_are_not_taken_from_the_cache(
    tiny_model, tokenizer_folder, tmp_path, changes
):
    settings = {name: value for name, value in changes.items() if name in {"sampling_steps", "image_guidance"}}
    concept = dataclasses.replace(CONCEPT, anchor=changes.get("anchor", CONCEPT.anchor))
    make(cache=tmp_path).erase(tiny_model, CONCEPT, Off(), seed=0)
    if "model" in changes:
        with torch.no_grad():
            tiny_model.network.conv_in.bias.add_(0.1)
    if "beta_end" in changes:
        pipeline = make_tiny_pipeline(tokenizer_folder)
        pipeline.scheduler.register_to_config(**changes)
        tiny_model = TextToImage(pipeline, name="tiny")
    if "scaling_factor" in changes:
        tiny_model.vae.register_to_config(**changes)

    expected = make(**settings).erase(tiny_model, concept, Off(), seed=changes.get("seed", 0))
    erasure = make(cache=tmp_path, **settings).erase(tiny_model, concept, Off(), seed=changes.get("seed", 0))

    assert erasure.losses == expected.losses
    assert len(list(tmp_path.glob("*.pictures"))) == 2


def test_the_cache_is_no_part_of_a_hash_and_lies_in_the_store(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    config = make_job("eraser=ac_sd14", "store=elsewhere").config["eraser"]

    assert config["cache"] == "elsewhere/anchors"
    assert "cache" not in matters(config, TRAINING_SPEED_ONLY)


def test_the_first_tokens_keys_and_values_get_no_gradient(tiny_model64):
    attention = next(module for name, module in tiny_model64.network.named_modules() if name.endswith(".attn2"))
    weights = [attention.to_q.weight, attention.to_k.weight, attention.to_v.weight]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((5, attention.to_q.in_features), generator=generator, dtype=torch.float64)
    text = tiny_model64.encode(["a church"])[0].detach()
    results = []
    attention.to_out[0] = torch.nn.Identity()

    with tiny_model64.trainable(weights):
        for enabled in (True, False):
            with first_token_detached(tiny_model64, enabled=enabled):
                ours = attention(hidden[None], encoder_hidden_states=text[None])[0]
            theirs = oracle.attention(hidden, text, *weights, attention.heads, cut=enabled)
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
            gradients = [torch.autograd.grad(output.square().sum(), weights) for output in (ours, theirs)]
            for mine, wanted in zip(*gradients, strict=True):
                torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-12)
            results.append(gradients[0])

    cut, whole = results
    assert (cut[1] - whole[1]).norm() > 0.01 * whole[1].norm()
    assert (cut[2] - whole[2]).norm() > 0.01 * whole[2].norm()


def test_detaching_the_first_token_changes_the_gradient_of_the_loss_alone(tiny_model64):
    weights = list(scope_parameters(tiny_model64, "xattn_kv").values())
    losses, gradients = [], []
    for detach in (False, True):
        objective = ACObjective(make(detach_first_token=detach))
        objective.prepare(tiny_model64, CONCEPT, scope="xattn_kv", steps=1, seed=3, checkpoint=None)
        with tiny_model64.trainable(weights):
            loss = objective.loss(tiny_model64, 0)
            gradients.append(torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)]))
        losses.append(loss.item())

    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert (gradients[0] - gradients[1]).norm() > 0.01 * gradients[0].norm()
    assert not any(module._forward_hooks for module in tiny_model64.network.modules())


EMBEDDING = dataclasses.replace(CONCEPT, preserved=("a style",))


def test_embedding_scope_trains_the_tokens_that_only_targets_have(tiny_model):
    fingerprint = tiny_model.fingerprint()
    kept = ["", "a picture", "a church, a picture", "a style"]
    targets = tiny_model.tokenize(EMBEDDING.target_prompts).flatten().tolist()
    expected = sorted(set(targets) - set(tiny_model.tokenize(kept).flatten().tolist()))
    before, texts = tiny_model.vocabulary.clone(), tiny_model.encode(kept)

    erasure = make(scope="token_embedding", learning_rate=1e-2, steps=8).erase(tiny_model, EMBEDDING, Off(), seed=0)

    assert tiny_model.fingerprint() == fingerprint
    assert erasure.edit.metadata["scope"] == "token_embedding"
    assert erasure.unet_evaluations == 3 * 2 * 2 + 8 * 2 * 2
    with erasure.edit.applied(tiny_model):
        changed = (tiny_model.vocabulary != before).any(dim=1).nonzero().flatten().tolist()
        assert changed == expected == target_token_rows(tiny_model, EMBEDDING).tolist()
        assert torch.equal(tiny_model.encode(kept), texts)
        assert not torch.equal(tiny_model.encode(["van gogh"]), tiny_model.encode(["a picture"]))
    assert erasure.edit.size_bytes == len(expected) * (8 + 32 * 4)


def test_first_step_of_embedding_training_is_adamws_on_the_gradient_of_those_rows(tiny_model):
    config = make(scope="token_embedding", steps=1, learning_rate=1e-2, weight_decay=0.1, clip_norm=None)
    objective = ACObjective(config)
    objective.prepare(tiny_model, EMBEDDING, scope="xattn_kv", steps=1, seed=0, checkpoint=None)
    [(name, table)] = scope_parameters(tiny_model, "token_embedding").items()
    rows = target_token_rows(tiny_model, EMBEDDING)
    with tiny_model.trainable([table]):
        gradient = torch.autograd.grad(objective.loss(tiny_model, 0), table)[0][rows]
    start = table.detach()[rows]
    expected = start * (1 - 1e-2 * 0.1) - 1e-2 * gradient / (gradient.abs() + 1e-8)

    edit = config.erase(tiny_model, EMBEDDING, Off(), seed=0).edit

    with edit.applied(tiny_model):
        torch.testing.assert_close(named_parameters(tiny_model)[name][rows], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pruning", [Learned(steps=2, scope=None), Magnitude(Sparsity(0.5))], ids=["learned", "scored"])
def test_pruning_beside_trained_embeddings_acts_on_keys_and_values(tiny_model, pruning):
    edit = make(scope="token_embedding").erase(tiny_model, EMBEDDING, pruning, seed=0).edit

    assert edit.metadata["maskable_weights"] == sum(
        weight.numel() for weight in scope_parameters(tiny_model, "xattn_kv").values()
    )


def test_embedding_scope_without_tokens_of_its_own_is_refused_before_pictures_are_made(tiny_model):
    concept = dataclasses.replace(CONCEPT, preserved=("style gogh van", "vincent by"))

    with pytest.raises(ValueError, match="every token of concept 'van_gogh'"):
        make(scope="token_embedding").erase(tiny_model, concept, Off(), seed=0)
    assert tiny_model.unet_evaluations == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scope": "token_embedding", "retain_weight": 1.0}, "retain_weight is 1.0 and scope 'token_embedding'"),
        ({"scope": "token_embedding", "prior_weight": 1.0}, "prior_weight is 1.0 and scope 'token_embedding'"),
        ({"variant": "both"}, "'model' or 'noise'"),
        ({"prior_weight": -1.0}, "greater than or equal to 0"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_loaded(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_presets_hold_the_authors_settings(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    published = {
        "ac_sd14": ("xattn_kv", 200, 8e-6, 0.0),
        "ac_object_sd14": ("xattn_kv", 200, 1.6e-5, 0.25),
        "ac_nudity_sd14": ("attn", 800, 3.2e-5, 0.25),
        "ac_unsafe_sd14": ("attn", 800, 3.2e-5, 0.25),
    }
    for preset, (scope, steps, learning_rate, prior_weight) in published.items():
        expected = AC(scope=scope, steps=steps, learning_rate=learning_rate, prior_weight=prior_weight)
        made = make_job(f"eraser={preset}").eraser
        assert dataclasses.replace(made, sampling_batch_size=64, cache=None) == expected


def test_gradient_reaches_the_target_prompts_prediction_only(tiny_model64):
    concept = Concept("same", "style", targets=("a picture",), anchor="a picture")
    objective = ACObjective(make())
    objective.prepare(tiny_model64, concept, scope="xattn_kv", steps=1, seed=0, checkpoint=None)

    with tiny_model64.trainable(list(scope_parameters(tiny_model64, "xattn_kv").values())):
        loss = objective.loss(tiny_model64, 0)

    assert loss.item() == pytest.approx(0, abs=1e-20)
    assert loss.requires_grad


@pytest.mark.parametrize(
    ("changes", "a_step"),
    [({}, 2), ({"variant": "noise"}, 1), ({"prior_weight": 1.0}, 3), ({"variant": "noise", "prior_weight": 1.0}, 2)],
)
def test_cost_is_exactly_the_formulas(tiny_model, changes, a_step):
    erasure = make(**changes).erase(tiny_model, CONCEPT, Off(), seed=0)

    assert erasure.unet_evaluations == tiny_model.unet_evaluations == 3 * 2 * 2 + 4 * 2 * a_step
    assert set(erasure.edit.entries) == set(scope_parameters(tiny_model, "xattn_kv"))


@pytest.mark.parametrize(
    ("pruning", "changes"),
    [
        (Off(), {"retain_weight": 0.5, "prior_weight": 0.5}),
        nightly(Learned(steps=4, scope=None), {"retain_weight": 0.5}),
        (Off(), {"scope": "token_embedding"}),
    ],
    ids=["off", "learned", "embeddings"],
)
def test_killed_training_resumes_to_the_same_edit_bit_for_bit(tiny_model, tmp_path, monkeypatch, pruning, changes):
    monkeypatch.setattr(finetuning, "CHECKPOINT_EVERY", 2)
    eraser = make(**changes)
    undisturbed = eraser.erase(tiny_model, CONCEPT, pruning, seed=1)
    loss = ACObjective.loss

    def dying_loss(self, model, step):
        if step == 3:
            raise RuntimeError("killed")
        return loss(self, model, step)

    monkeypatch.setattr(ACObjective, "loss", dying_loss)
    with pytest.raises(RuntimeError, match="killed"):
        eraser.erase(tiny_model, CONCEPT, pruning, seed=1, checkpoint=tmp_path / "work")
    monkeypatch.setattr(ACObjective, "loss", loss)
    resumed = eraser.erase(tiny_model, CONCEPT, pruning, seed=1, checkpoint=tmp_path / "work")

    assert_same_erasure(resumed, undisturbed)
