"""SAFREE against its formulas, in its gradients, and in what attacks and pruning make of a filtered model."""

import dataclasses
from pathlib import Path

import pytest
import torch

from diffusion.model import TextToImage
from diffusion.prompt_template import PromptTemplate
from erasure.addition import attached
from erasure.additions import safree as addition
from erasure.additions.safree import attenuated
from erasure.concept import Concept
from erasure.edit import Edit
from erasure.erasers.safree import SAFREE
from erasure.pruning.conceptprune import ConceptPrune
from erasure.pruning.learned import Learned
from erasure.pruning.magnitude import Magnitude
from erasure.pruning.masks import Sparsity
from erasure.pruning.off import Off
from tests import tiny_job
from tests.canvas_effect import effect_on_canvas
from tests.conftest import make_tiny_pipeline
from tests.night import all_but
from tests.oracles import safree as oracle
from tests.tiny_job import CONFIG_FOLDER, make_job, run

CONCEPT = Concept("van_gogh", "style", targets=("van gogh style", "by vincent", "van gogh style"), anchor="a picture")
BOTH = dataclasses.replace(CONCEPT, also=(Concept("church", "object", targets=("a church", "a chapel")),))
PROMPTS = [
    "a church in van gogh style",
    "two blue fish in the snow",
    "",
    "church",
    "' a ' fish '",  # the tiny vocabulary reads a lone apostrophe as the end
    "a painting of a red church by vincent van gogh " * 4,
]
# On the tiny model beta is small: these settings spread the prompts over the steps.
SETTINGS = {"slope": 0.4, "midpoint": 2.0, "most_steps": 12, "steps": 10}


def make(**changes):
    return SAFREE(**{**SETTINGS, **changes})


def erased(model, config, concept=CONCEPT) -> Edit:
    return config.erase(model, concept, Off(), seed=0).edit


def encoder(model):
    return lambda ids: model.encode_ids(torch.tensor([ids]))[0]


def span(model, prompts):
    end = model.tokenizer.eos_token_id
    return [oracle.pooled(encoder(model), ids, end) for ids in model.tokenize(prompts).tolist()]


@torch.no_grad()
@pytest.mark.parametrize(
    ("alpha", "filters"),
    [
        (0.01, [True, True, False, True, False, True]),
        (0.0, [True, True, False, True, False, True]),
        (0.1, [False, False, False, True, False, False]),
    ],
)
@pytest.mark.parametrize("projection", ["prompt_last", "concept_last"])
def test_text_and_steps_are_those_of_the_formulas(tiny_model64, projection, alpha, filters):
    model, end = tiny_model64, tiny_model64.tokenizer.eos_token_id
    concept = span(model, CONCEPT.targets)
    rows = model.tokenize(PROMPTS).tolist()
    texts = [oracle.filtered(encoder(model), ids, end, concept, alpha, projection) for ids in rows]
    steps = [oracle.last_step(encoder(model), ids, end, concept, projection, 12, 0.4, 2.0) for ids in rows]
    plain = model.encode(PROMPTS)

    with erased(model, make(projection=projection, alpha=alpha)).applied(model):
        text = model.encode(PROMPTS)
        timesteps = model.sampling_timesteps(10)
        given = [model.guard.condition(text, timestep.expand(len(text))) for timestep in timesteps]

    expected = torch.stack(texts)
    assert torch.allclose(text[:, :24], expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(text[:, 24:48], plain)
    changed = (expected != plain).any(dim=2).any(dim=1)
    assert changed.tolist() == filters
    for place, last in enumerate(steps):
        for step in range(10):
            assert torch.equal(given[step][place], text[place, :24] if step <= last else plain[place])
    assert len({*steps}) >= 3


@torch.no_grad()
def test_a_step_stands_for_its_timestep_between_those_of_the_sampler(tiny_model64):
    with erased(tiny_model64, make(slope=0.0, most_steps=6)).applied(tiny_model64):
        text = tiny_model64.encode(PROMPTS[:1])
        third = int(tiny_model64.sampling_timesteps(10)[3])
        given = {t: tiny_model64.guard.condition(text, torch.tensor([t])) for t in (999, third, third - 1, 0)}
        fraction = tiny_model64.guard.condition(text, torch.tensor([third - 0.4]))

    filtered, original = text[:, :24], text[:, 24:48]
    assert torch.equal(given[999], filtered)
    assert torch.equal(given[third], filtered)
    assert torch.equal(fraction, filtered)
    assert torch.equal(given[third - 1], original)
    assert torch.equal(given[0], original)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"most_steps": None}, {"midpoint": -100.0, "most_steps": 9}])
def test_filtering_at_every_step_has_no_end(tiny_model64, settings):
    with erased(tiny_model64, make(**settings)).applied(tiny_model64):
        text = tiny_model64.encode(PROMPTS)
        assert torch.equal(tiny_model64.guard.condition(text, torch.zeros(len(text))), text[:, :24])


@pytest.mark.parametrize("projection", ["prompt_last", "concept_last"])
def test_gradients_are_those_of_finite_differences(tiny_model64, projection):
    model = tiny_model64
    template = PromptTemplate.insert(model, PROMPTS[:2], 2, "prefix_k")
    generator = torch.Generator().manual_seed(0)
    tokens = model.vocabulary[torch.randint(20, 200, (2, 2), generator=generator)].detach()
    direction = torch.randn(tokens.shape, generator=generator, dtype=torch.float64)
    weights = torch.randn((2, 49, 32), generator=generator, dtype=torch.float64)
    with erased(model, make(projection=projection, most_steps=None)).applied(model):

        def value(embeddings):
            return (template.encode(model, embeddings) * weights).sum()

        tokens.requires_grad_()
        (gradient,) = torch.autograd.grad(value(tokens), tokens)
        with torch.no_grad():
            step = 1e-6
            slope = (value(tokens + step * direction) - value(tokens - step * direction)) / (2 * step)

    assert gradient.isfinite().all()
    assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-5)
    assert abs(slope.item()) > 1e-3


def test_gradients_are_finite_where_prompts_are_empty_or_repeat_themselves(tiny_model):
    template = PromptTemplate.insert(tiny_model, ["", "' ' ' '"], 2, "prefix_k")
    tokens = tiny_model.vocabulary[torch.zeros((2, 2), dtype=torch.int64)].detach().requires_grad_()
    with erased(tiny_model, make()).applied(tiny_model):
        (gradient,) = torch.autograd.grad(template.encode(tiny_model, tokens).square().sum(), tokens)
        empty = tiny_model.vocabulary[tiny_model.tokenize([""])].detach().requires_grad_()
        text = tiny_model.encode_embeddings(empty, torch.tensor([1]))
        (alone,) = torch.autograd.grad(text.square().sum(), empty)

    assert gradient.isfinite().all()
    assert alone.isfinite().all()


@torch.no_grad()
def test_a_text_does_not_depend_on_the_others_or_on_chunks(tiny_model64, monkeypatch):
    with erased(tiny_model64, make()).applied(tiny_model64):
        together = tiny_model64.encode(PROMPTS)
        alone = torch.cat([tiny_model64.encode([prompt]) for prompt in PROMPTS])
        monkeypatch.setattr(addition, "ENCODED_AT_ONCE", 3)
        chunked = tiny_model64.encode(PROMPTS)

    assert torch.allclose(together, alone, rtol=1e-9, atol=1e-9)
    assert torch.allclose(together, chunked, rtol=1e-9, atol=1e-9)


def test_the_subspace_is_that_of_all_targets_of_all_concepts(tiny_model64):
    for config, prompts in (
        (make(), ["van gogh style", "by vincent", "a church", "a chapel"]),
        (make(in_templates=True), ["a fish, van gogh style", "a fish, by vincent", "a church", "a chapel"]),
    ):
        concept = dataclasses.replace(BOTH, templates=("a fish, {}",))
        basis = erased(tiny_model64, config, concept).additions[0].basis
        expected = torch.stack(oracle.orthonormal(span(tiny_model64, prompts)))

        assert basis.shape == (4, 32)
        assert torch.allclose(basis.T @ basis, expected.T @ expected, atol=1e-9)


@torch.no_grad()
def test_the_concept_takes_the_empty_prompts_place_when_asked(tiny_model64):
    model = tiny_model64
    latents = model.initial_latents([1, 2])
    negative = model.encode(["van gogh style, by vincent"])
    plain = model.encode([""])
    predictions = {}
    for asked in ("never", "always", "while_filtering"):
        # A step of ten stands for a hundred timesteps: filtered are those from 700 on.
        with erased(model, make(negative_prompt=asked, slope=0.0, most_steps=6)).applied(model):
            text = model.encode(PROMPTS[:2])
            for t in (800, 500):
                predictions[asked, t] = model.guided(latents, t, text, model.encode([""]), 3.0)
    for (asked, t), found in predictions.items():
        is_negative = asked == "always" or (asked == "while_filtering" and t == 800)
        empty = negative if is_negative else plain
        without = model.predict(latents, t, empty.expand(2, -1, -1))
        prompted = model.predict(latents, t, text[:, :24] if t == 800 else text[:, 24:48])
        assert torch.allclose(found, without + 3 * (prompted - without), atol=1e-12)


@torch.no_grad()
def test_re_attention_lowers_what_filtered_prompts_have_more_of():
    generator = torch.Generator().manual_seed(0)
    skip = torch.randn((6, 2, 4, 6), generator=generator, dtype=torch.float64)
    found = attenuated(skip, 0.3)

    assert torch.equal(found[:2], skip[:2])
    assert torch.equal(found[4:], skip[4:])
    for picture in range(2):
        for channel in range(2):
            expected = oracle.attenuated(skip[2 + picture, channel], skip[4 + picture, channel], 0.3)
            assert torch.allclose(found[2 + picture, channel], expected, atol=1e-12)


@torch.no_grad()
def test_re_attention_goes_by_the_width_that_a_layer_adds_to_and_costs_a_third_evaluation(tiny_model64):
    model = tiny_model64
    latents, scales = model.initial_latents([1, 2]), torch.tensor([3.0, 1.0])
    settings = {"seeds": [1, 2], "steps": 3, "guidance": [1.0, 4.0]}
    with erased(model, make(skip_scales=(0.5, 0.2), most_steps=None)).applied(model):
        text, empty = model.encode(PROMPTS[:2]), model.encode([""])[0]
        found = model.guard.guidance(model)(latents, torch.tensor([500, 500]), text, empty, scales)
        alone = model.predict(latents, 500, text)
        spent = model.unet_evaluations
        together = model.sample(text, **settings)
        spent = model.unet_evaluations - spent
        assert model.evaluations_per_step(1.0) == model.evaluations_per_step(4.0) == 3
        assert torch.allclose(model.sample(text, **settings, batch_size=1), together, atol=1e-12)
    assert spent == 3 * 3 * 2
    texts = torch.cat([empty[None, :24].expand(2, -1, -1), text[:, :24], text[:, 24:48]])
    hooks = []
    # Layers take skip connections from the last on; the second block comes to its first with the first block's width.
    for block, factors in zip(model.network.up_blocks, ((0.5, 0.5), (0.2, 0.5)), strict=True):

        def before(_block, arguments, named, factors=factors):
            skips = tuple(map(attenuated, named["res_hidden_states_tuple"], factors))
            return arguments, {**named, "res_hidden_states_tuple": skips}

        hooks.append(block.register_forward_pre_hook(before, with_kwargs=True))
    without, prompted, _ = model.predict(latents.repeat(3, 1, 1, 1), 500, texts).chunk(3)
    for hook in hooks:
        hook.remove()

    assert torch.allclose(found, without + scales.view(-1, 1, 1, 1) * (prompted - without), atol=1e-12)
    assert torch.equal(alone, model.predict(latents, 500, text[:, :24]))
    assert not torch.allclose(prompted, alone)


def test_it_leaves_no_trace(tiny_model):
    text, latents = tiny_model.encode(PROMPTS), tiny_model.initial_latents(range(len(PROMPTS)))
    before = tiny_model.predict(latents, 500, text)
    with erased(tiny_model, make(skip_scales=(0.9, 0.2))).applied(tiny_model):
        assert not torch.equal(tiny_model.predict(latents, 900, tiny_model.encode(PROMPTS)), before)
    assert tiny_model.guard is None
    assert not any(block._forward_pre_hooks for block in tiny_model.network.up_blocks)
    assert torch.equal(tiny_model.predict(latents, 500, tiny_model.encode(PROMPTS)), before)


def test_it_costs_nothing_and_leaves_the_weights_alone(tiny_model):
    fingerprint = tiny_model.fingerprint()

    erasure = make().erase(tiny_model, CONCEPT, Off(), seed=0)

    assert erasure.unet_evaluations == tiny_model.unet_evaluations == 0
    assert erasure.losses == []
    assert not erasure.edit.entries
    assert tiny_model.fingerprint() == fingerprint == erasure.edit.metadata["base"]
    assert erasure.edit.metadata["method"] == "SAFREE"


@pytest.mark.parametrize("changes", [{}, {"negative_prompt": "always", "skip_scales": (0.9, 0.2), "most_steps": None}])
def test_it_is_read_back_as_it_was_saved(tiny_model, changes, tmp_path: Path):
    edit = erased(tiny_model, make(**changes))
    edit.save(tmp_path / "edit.safetensors")
    read = Edit.load(tmp_path / "edit.safetensors")
    pictures = []
    for one in (edit, read):
        with one.applied(tiny_model):
            pictures.append(tiny_model.generate(PROMPTS, seeds=range(6), steps=3, guidance=4.0))

    assert torch.equal(*pictures)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_number_of_steps(tokenizer_folder, dtype):
    pipeline = make_tiny_pipeline(tokenizer_folder).to(dtype)
    model = TextToImage(pipeline, name="half")
    with erased(model, make(slope=0.0, most_steps=94, steps=1000)).applied(model):
        text = model.encode(PROMPTS)
        timesteps = model.sampling_timesteps(1000)
        at, after = (model.guard.condition(text, timesteps[step].expand(len(text))) for step in (47, 48))

    assert text.dtype == dtype
    assert torch.equal(at, text[:, :24])
    assert torch.equal(after, text[:, 24:48])


def test_text_of_the_unguarded_model_is_refused(tiny_model):
    text = tiny_model.encode(PROMPTS[:1])
    with (
        erased(tiny_model, make()).applied(tiny_model),
        pytest.raises(ValueError, match="text has 24 rows and SAFREE's has 49; encode prompts with the guarded model"),
    ):
        tiny_model.predict(tiny_model.initial_latents([1]), 500, text)


def test_another_models_subspace_is_refused(tiny_model):
    [filters] = erased(tiny_model, make()).additions
    narrow = dataclasses.replace(filters, basis=filters.basis[:, :8])
    with (
        pytest.raises(ValueError, match="made for text of width 8 and that of 'tiny' has 32"),
        attached(tiny_model, narrow),
    ):
        pass
    assert tiny_model.guard is None


@torch.no_grad()
@pytest.mark.parametrize(
    "pruning", [Magnitude(Sparsity(0.5)), ConceptPrune(sampling_steps=3, first_steps=2, pictures=4)]
)
def test_scored_pruning_acts_on_the_filtered_model(tiny_model, pruning):
    erasure = make().erase(tiny_model, CONCEPT, pruning, seed=0)

    assert erasure.unet_evaluations == tiny_model.unet_evaluations
    assert [addition.kind for addition in erasure.edit.additions] == ["safree"]
    assert erasure.edit.masks()
    with erasure.edit.applied(tiny_model):
        assert tiny_model.guard is not None


def test_pruning_that_learns_is_refused(tiny_model):
    with pytest.raises(ValueError, match="eraser 'SAFREE' has none"):
        make().erase(tiny_model, CONCEPT, Learned(), seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": -0.1}, "greater than or equal to 0"),
        ({"slope": -1.0}, "greater than or equal to 0"),
        ({"most_steps": -1}, "greater than or equal to 0"),
        ({"steps": 0}, "greater than or equal to 1"),
        ({"projection": "none"}, "'prompt_last' or 'concept_last'"),
        ({"skip_scales": (0.9, 1.2)}, "less than or equal to 1"),
        ({"skip_scales": (0.9,)}, "Field required"),
        ({"learning_rate": 3}, "Unexpected keyword"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_loaded(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize("choice", sorted(path.stem for path in (CONFIG_FOLDER / "eraser").glob("safree*.yaml")))
def test_every_preset_names_every_field(choice, monkeypatch):
    monkeypatch.chdir(CONFIG_FOLDER.parent)
    job = make_job(f"eraser={choice}")

    assert isinstance(job.eraser, SAFREE)
    assert set(job.config["eraser"]) == {"_target_", *(field.name for field in dataclasses.fields(SAFREE))}


@pytest.mark.parametrize(("choice", "expected"), [("safree_sd14", (2.5, 5.333)), ("safree_style_sd14", (3.5, 5.5))])
def test_presets_hold_the_authors_settings(choice, expected, monkeypatch):
    monkeypatch.chdir(CONFIG_FOLDER.parent)
    eraser = make_job(f"eraser={choice}").eraser

    assert (eraser.slope, eraser.midpoint) == expected
    assert (eraser.alpha, eraser.most_steps, eraser.steps, eraser.skip_scales) == (0.01, 10, 50, None)


ATTACKS = {
    "none": [],
    "random": ["tries=2"],
    "unlearndiff": ["timesteps=2", "steps_per_timestep=2"],
    "embedding": ["timesteps=2", "steps_per_timestep=2"],
    "textual_inversion": ["pictures=2", "checks=1", "steps_per_check=2", "pictures_per_step=2"],
    "p4d": ["tokens=3", "checks=1", "steps_per_check=2"],
    "ringabell": ["tokens=3", "population=4", "generations=2"],
    "gcg": ["tokens=2", "timesteps=1", "substitutions=2", "draws=1", "top_k=4"],
    "pez": ["timesteps=1", "steps_per_timestep=2"],
    "noise": ["unrolled_steps=2", "checks=1", "steps_per_check=1"],
    "relearn": ["checks=[1]", "count=2", "pictures_per_step=2"],
}
"""What is searched under the guard, by the attacks' own settings."""


@pytest.mark.parametrize("attack", all_but({"unlearndiff", "gcg", "relearn"}, ATTACKS))
def test_a_job_with_any_attack_counts_every_evaluation(attack, world, monkeypatch, tmp_path):
    monkeypatch.chdir(CONFIG_FOLDER.parent)
    models = [tiny_job.Float64Folder(world / "model").load()]
    monkeypatch.setattr(tiny_job.Float64Folder, "load", lambda self: models[0])
    unedited = Edit.unedited
    monkeypatch.setattr(Edit, "unedited", lambda *arguments: models.append(unedited(*arguments)) or models[-1])
    command = [part for part in tiny_job.overrides(world, tmp_path / "store") if part[:6] not in {"eraser", "attack"}]
    command += ["eraser=safree", "eraser.skip_scales=[0.9,0.2]", "prompts=3", f"attack={attack}"]

    summary = run([*command, *(f"attack.{setting}" for setting in ATTACKS[attack])], tmp_path / "run")

    assert len(summary["cases"]) == 3
    paid = sum(cost["unet_evaluations"] for cost in summary["costs"].values())
    assert paid == sum(model.unet_evaluations for model in models)
    assert models[0].guard is None


@pytest.mark.slow
@pytest.mark.parametrize("concept", ["van_gogh", "church"])
def test_the_concept_goes_from_the_canvas_and_the_rest_stays(concept, monkeypatch):
    monkeypatch.chdir(CONFIG_FOLDER.parent)

    shown, kept = effect_on_canvas(concept, "eraser=safree", prompts=8, retained=12, steps=10)

    assert shown <= 0.6
    assert kept >= 0.7
