"""MACE's three steps against their formulas, matrix by matrix and pixel by pixel; cost, resumption and effect."""

import dataclasses

import pytest
import torch

from diffusion.loading import load_model
from diffusion.parameters import substituted
from diffusion.streams import stream
from erasure import finetuning
from erasure.closed_form import key_value_weights
from erasure.concept import Concept
from erasure.erasers import mace
from erasure.erasers.mace import MACE
from erasure.parameters import scope_parameters
from erasure.pruning.learned import Learned
from erasure.pruning.magnitude import Magnitude
from erasure.pruning.masks import Sparsity
from erasure.pruning.off import Off
from tests.canvas_effect import effect_on_canvas
from tests.erasures import assert_same_erasure
from tests.oracles import attention as maps_oracle
from tests.oracles import fmn as attention_oracle
from tests.oracles import mace as oracle
from tests.tiny_job import CONFIG_FOLDER, make_job, method_config

STYLE = Concept(
    "van_gogh",
    "style",
    targets=("van gogh style", "by vincent"),
    anchor="a picture",
    templates=("{}", "a house, {} in the snow"),
    preserved=("a fish", "a red church"),
)
CHURCH = Concept("church", "object", targets=("a church",), templates=("{}", "a photo of {}"), preserved=("a tench",))
BOTH = dataclasses.replace(STYLE, also=(CHURCH,))


def make(**changes):
    small = {"ridge": 0.5, "steps": 4, "batch_size": 2, "images": 3, "sampling_steps": 2, "mask_reduction": 1}
    return MACE(**{**small, **changes})


def kept_embeddings(model, concept, weight, captions=()):
    """(weight, embedding) of every token of what is preserved."""
    prompts = [(1.0, caption) for caption in captions] + [(weight, phrase) for phrase in concept.preserved_prompts]
    return [(weight, token) for weight, prompt in prompts for token in model.encode([prompt])[0]]


def expected_refinement(model, concept, *, ridge, kept):
    pairs = []
    for part in concept.parts:
        for target in part.targets:
            for template in part.templates:
                before, after = template.split("{}")
                prompts = [template.replace("{}", phrase) for phrase in (target, part.anchor)]
                sides = [
                    oracle.positions_around(model.tokenizer, before, phrase, after, model.max_tokens)[1]
                    for phrase in (target, part.anchor)
                ]
                pairs += oracle.pairs_around(
                    model.encode([prompts[0]])[0], sides[0], model.encode([prompts[1]])[0], sides[1]
                )
    return {name: oracle.refined(weight, pairs, kept, ridge) for name, weight in key_value_weights(model).items()}


def assert_close(weights, expected):
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert (weight - expected[name]).norm() <= 1e-9 * expected[name].norm(), name


@torch.no_grad()
@pytest.mark.parametrize(
    ("concept", "published"),
    [
        (STYLE, True),
        (BOTH, False),
        (dataclasses.replace(STYLE, anchor=""), False),
        (dataclasses.replace(STYLE, anchor="a picture of a red fish"), False),
    ],
    ids=["published", "two concepts", "no anchor", "longer anchor"],
)
def test_refinement_sends_what_surrounds_the_target_where_it_goes_around_the_anchor(
    tiny_model64, tmp_path, concept, published
):
    captions = ["two blue fish", "a gas pump"]
    (tmp_path / "captions.txt").write_text("\n".join(captions) + "\n")
    eraser = make(
        refinement_preserve_scale=0.3,
        preserve_weight=2.0,
        published_prior=published,
        captions=tmp_path / "captions.txt",
    )
    scale = 0.3**2 if published else 0.3
    kept = [(scale * weight, token) for weight, token in kept_embeddings(tiny_model64, concept, 2.0, captions)]

    right = eraser.refinement(tiny_model64, concept, eraser.preserved(tiny_model64, concept))

    weights = key_value_weights(tiny_model64)
    refined = {name: weight @ right for name, weight in weights.items()}
    assert_close(refined, expected_refinement(tiny_model64, concept, ridge=0.5, kept=kept))
    assert all((refined[name] - weight).norm() > 1e-3 for name, weight in weights.items())


@torch.no_grad()
@pytest.mark.parametrize("focus", [(200, 400), None])
@pytest.mark.parametrize("part", [STYLE, CHURCH], ids=["style", "object"])
def test_loss_is_the_attention_at_the_concepts_tokens_within_its_mask(tiny_model64, part, focus):
    config = make(focus=focus, end_tokens=part is CHURCH)
    attention = mace.ConceptAttention(config, tiny_model64, part, seed=3, number=1, checkpoint=None)
    pieces = [(target, template) for target in part.targets for template in part.templates]
    own = []
    for target, template in pieces:
        before, after = template.split("{}")
        own.append(oracle.positions_around(tiny_model64.tokenizer, before, target, after, tiny_model64.max_tokens)[0])
    text = tiny_model64.encode(part.target_prompts)
    pictures = attention._pictures.latents

    masks = [None] * 3
    if part.kind == "object":
        noise = torch.randn((3, 4, 8, 8), generator=stream(3, "mace/masks", 1)).double()
        alpha = tiny_model64.process.alphas[200].item()
        for place in range(3):
            x_t = alpha**0.5 * pictures[place] + (1 - alpha) ** 0.5 * noise[place]
            seen = attention_oracle.seen_by_layers(tiny_model64.network, x_t, 200, text[place % 2])
            layers = [attention_oracle.probabilities(layer, pixels, text[place % 2]) for layer, pixels in seen]
            largest = [heads for heads in layers if len(heads[0]) == 64]
            stretched = maps_oracle.stretched_map(largest, own[place % 2], (8, 8))
            masks[place] = [[value >= 0.5 for value in row] for row in stretched]
        assert attention._masks.tolist() == masks
        assert 0 < attention._masks.double().mean() < 1

    for step in range(2):
        generator = stream(3, "mace/training", 1, step)
        picks = torch.randint(3, (2,), generator=generator).tolist()
        if focus is None:
            timesteps = torch.randint(1000, (2,), generator=generator).tolist()
        else:
            chances = torch.tensor([oracle.chance(t, *focus, 0.05) for t in range(1000)], dtype=torch.float64)
            timesteps = torch.multinomial(chances, 2, replacement=True, generator=generator).tolist()
        noise = torch.randn((2, 4, 8, 8), generator=generator).double()
        rows = []
        for place, (pick, t) in enumerate(zip(picks, timesteps, strict=True)):
            alpha = tiny_model64.process.alphas[t].item()
            x_t = alpha**0.5 * pictures[pick] + (1 - alpha) ** 0.5 * noise[place]
            prompt = pick % len(pieces)
            target, template = pieces[prompt]
            end = len(tiny_model64.tokenizer(template.replace("{}", target)).input_ids) - 1
            tokens = own[prompt] + (list(range(end, tiny_model64.max_tokens)) if config.end_tokens else [])
            rows.append((x_t, t, text[prompt], tokens, masks[pick]))

        assert attention.loss(tiny_model64, step).item() == pytest.approx(
            oracle.loss(tiny_model64.network, rows), rel=1e-9
        )


@pytest.mark.parametrize("published", [False, True])
def test_fusion_gives_every_concept_its_own_factors_and_none_of_the_others(tiny_model64, published):
    eraser = make(
        rank=2,
        learning_rate=0.1,
        refinement_preserve_scale=0.5,
        fusion_preserve_scale=0.3,
        preserve_weight=2.0,
        published_prior=published,
    )
    weights = {name: weight.clone() for name, weight in key_value_weights(tiny_model64).items()}
    right = eraser.refinement(tiny_model64, BOTH, eraser.preserved(tiny_model64, BOTH))
    refined = {name: weight @ right for name, weight in weights.items()}
    trained = [
        eraser.trained_factors(tiny_model64, part, refined, seed=5, number=number, checkpoint=None)[0]
        for number, part in enumerate(BOTH.parts)
    ]
    kept = [(0.3 * weight, token) for weight, token in kept_embeddings(tiny_model64, BOTH, 2.0)]
    texts = [tiny_model64.encode_prompts(part.target_prompts).flatten(0, 1) for part in BOTH.parts]

    edit = eraser.erase(tiny_model64, BOTH, Off(), seed=5).edit

    moved = [(B @ A).norm() > 1e-2 for factors in trained for B, A in factors.values()]
    assert sum(moved) == len(moved) - 2, "no attention comes after the last layer's values"
    expected = {}
    for name, weight in refined.items():
        concepts = [(*factors[name], list(text)) for factors, text in zip(trained, texts, strict=True)]
        expected[name] = oracle.fused(weight, concepts, kept, weights[name] if published else weight, 0.5)
    with edit.applied(tiny_model64):
        assert_close(key_value_weights(tiny_model64), expected)


def test_the_first_step_starts_at_the_refined_model_and_training_blinds_it(tiny_model):
    eraser = make(steps=20, learning_rate=1e-1)
    right = eraser.refinement(tiny_model, STYLE, eraser.preserved(tiny_model, STYLE))
    refined = {name: (weight.double() @ right).float() for name, weight in key_value_weights(tiny_model).items()}
    attention = mace.ConceptAttention(eraser, tiny_model, STYLE, seed=0, number=0, checkpoint=None)
    with torch.no_grad(), substituted(tiny_model, refined):
        first = attention.loss(tiny_model, 0).item()

    losses = eraser.erase(tiny_model, STYLE, Off(), seed=0).losses

    assert losses[0] == pytest.approx(first, rel=1e-6)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_a_mask_without_pixels_asks_for_nothing(tiny_model):
    attention = mace.ConceptAttention(make(), tiny_model, CHURCH, seed=0, number=0, checkpoint=None)
    attention._masks = torch.zeros_like(attention._masks)
    weights = list(scope_parameters(tiny_model, "xattn_kv").values())

    with tiny_model.trainable(weights):
        loss = attention.loss(tiny_model, 0)
        gradients = torch.autograd.grad(loss, weights, materialize_grads=True)

    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("concept", [STYLE, BOTH], ids=["one", "two"])
def test_cost_is_exactly_the_formulas_and_keys_and_values_alone_change(tiny_model, concept):
    fingerprint = tiny_model.fingerprint()

    erasure = make().erase(tiny_model, concept, Off(), seed=0)

    pictures, masks, training = 3 * 2 * 2, 3, 4 * 2
    expected = pictures + training if concept is STYLE else 2 * (pictures + training) + masks
    assert erasure.unet_evaluations == tiny_model.unet_evaluations == expected
    assert len(erasure.losses) == 4 * len(concept.parts)
    assert erasure.edit.entries.keys() == scope_parameters(tiny_model, "xattn_kv").keys()
    assert tiny_model.fingerprint() == fingerprint == erasure.edit.metadata["base"]


@pytest.mark.parametrize("dies_at", [3, 7])
def test_killed_training_resumes_to_the_same_edit_bit_for_bit(tiny_model, tmp_path, monkeypatch, dies_at):
    monkeypatch.setattr(finetuning, "CHECKPOINT_EVERY", 2)
    eraser = make()
    undisturbed = eraser.erase(tiny_model, BOTH, Off(), seed=1)
    loss = mace.ConceptAttention.loss
    steps = 0

    def dying_loss(self, model, step):
        nonlocal steps
        steps += 1
        if steps == dies_at + 1:
            raise RuntimeError("killed")
        return loss(self, model, step)

    monkeypatch.setattr(mace.ConceptAttention, "loss", dying_loss)
    with pytest.raises(RuntimeError, match="killed"):
        eraser.erase(tiny_model, BOTH, Off(), seed=1, checkpoint=tmp_path / "work")
    monkeypatch.setattr(mace.ConceptAttention, "loss", loss)
    before = tiny_model.unet_evaluations
    resumed = eraser.erase(tiny_model, BOTH, Off(), seed=1, checkpoint=tmp_path / "work")

    assert_same_erasure(resumed, undisturbed)
    assert tiny_model.unet_evaluations - before < undisturbed.unet_evaluations


def test_pictures_at_a_time_change_nothing(tiny_model64):
    one, other = (make(sampling_batch_size=size).erase(tiny_model64, CHURCH, Off(), seed=2) for size in (1, 64))

    assert one.losses == pytest.approx(other.losses, rel=1e-9)
    for name, entry in one.edit.entries.items():
        torch.testing.assert_close(entry.parts[""], other.edit.entries[name].parts[""], rtol=1e-9, atol=1e-9)


def test_scored_pruning_acts_on_the_erased_weights(tiny_model):
    pruning = Magnitude(Sparsity(0.5))
    with make().erase(tiny_model, STYLE, Off(), seed=0).edit.applied(tiny_model):
        weights = {name: weight.clone() for name, weight in scope_parameters(tiny_model, "xattn_kv").items()}
        masks = pruning.prune(tiny_model, STYLE, None, scope="xattn_kv", seed=0, checkpoint=None).edit.masks()

    with make().erase(tiny_model, STYLE, pruning, seed=0).edit.applied(tiny_model):
        for name, weight in scope_parameters(tiny_model, "xattn_kv").items():
            assert torch.equal(weight, weights[name] * masks[name])


def test_pruning_that_learns_is_refused_before_any_work(tiny_model):
    with pytest.raises(ValueError, match="eraser 'MACE' has none"):
        make().erase(tiny_model, STYLE, Learned(), seed=0)
    assert tiny_model.unet_evaluations == 0


def test_no_ridge_on_embeddings_that_leave_dimensions_open_is_refused(tiny_model):
    concept = dataclasses.replace(STYLE, targets=("van gogh",), templates=("{}",), preserved=())

    with pytest.raises(ValueError, match=r"ridge is 0 and .* span \d+ of 32 dimensions; give more captions or set"):
        make(ridge=0.0).erase(tiny_model, concept, Off(), seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ridge": -1.0}, "greater than or equal to 0"),
        ({"rank": 0}, "greater than or equal to 1"),
        ({"focus": (400, 200)}, r"focus is \[400, 200\]; its first timestep must be below the second"),
        ({"masked_kinds": ("celebrity",)}, "'style', 'object' or 'unsafe'"),
        ({"mask_threshold": 0.0}, "greater than 0"),
        ({"captions": "nowhere.txt"}, "there is no file at nowhere.txt; give a text file with one caption a line"),
        ({"norm": "layers"}, "Unexpected keyword"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_loaded(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize("preset", sorted(path.stem for path in (CONFIG_FOLDER / "eraser").glob("mace*.yaml")))
def test_every_preset_names_every_field(preset):
    named = method_config("eraser", preset).keys()

    assert named - {"_target_"} == {field.name for field in dataclasses.fields(MACE)}
    assert isinstance(make_job(f"eraser={preset}").eraser, MACE)


@torch.backends.mkldnn.flags(enabled=True)
def test_a_short_run_takes_the_canvas_eyes_off_the_concept(monkeypatch):
    monkeypatch.chdir(CONFIG_FOLDER.parent)
    shortened = ["images=8", "sampling_steps=4", "steps=30", "learning_rate=0.1"]
    job = make_job("concept=church", "eraser=mace", *(f"eraser.{part}" for part in shortened))

    losses = job.eraser.erase(load_model("canvas"), job.concept, job.pruning, seed=0).losses

    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


@pytest.mark.slow
@pytest.mark.parametrize("concept", ["van_gogh", "church"])
def test_the_concept_goes_from_the_canvas_and_the_rest_stays(monkeypatch, concept):
    monkeypatch.chdir(CONFIG_FOLDER.parent)

    shown, kept = effect_on_canvas(concept, "eraser=mace", prompts=24, retained=48)

    assert shown <= 0.5
    assert kept >= 0.8
