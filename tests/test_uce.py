"""UCE against its formula matrix by matrix, for both token rules, and by its effect on the canvas."""

import dataclasses
import time
from pathlib import Path

import pytest
import torch

from diffusion.loading import load_model
from erasure.closed_form import Term, key_value_weights, right_multiplication
from erasure.concept import Concept
from erasure.edit import Edit
from erasure.erasers.uce import UCE
from erasure.parameters import scope_parameters
from erasure.pruning.learned import Learned
from erasure.pruning.magnitude import Magnitude
from erasure.pruning.masks import Sparsity
from erasure.pruning.off import Off
from erasure.pruning.random import Random
from evaluation.prompt_sets import read_prompt_set
from evaluation.quality.accuracy import RetainedAccuracy
from tests.oracles import uce as oracle
from tests.tiny_job import make_job

CONCEPT = Concept(
    "van_gogh",
    "style",
    targets=("van gogh style", "by vincent", "a painting like starry night"),
    anchor="a picture",
    templates=("{}", "a house, {}"),
    preserved=("a fish", "a church in the snow"),
    preserved_templates=("{}", "a red {}"),
)


def embeddings(model, prompt):
    """Text embeddings float64 [tokens, width] and the last subject token's position."""
    ids = model.tokenize([prompt])[0].tolist()
    return model.encode([prompt])[0], oracle.last_token(ids, model.tokenizer.eos_token_id)


def expected_weights(model, concept, *, tokens, ridge, erase_scale, preserve_scale, anchor=None, debias=None):
    assert anchor is None
    assert debias is None
    rule = oracle.pairs_2025 if tokens == "last" else oracle.pairs_2023
    pairs = []
    for target in concept.targets:
        for template in concept.templates:
            phrases = (template.format(target), template.format(concept.anchor))
            pairs += rule(*embeddings(model, phrases[0]), *embeddings(model, phrases[1]))
    kept = []
    preserved = [template.format(phrase) for phrase in concept.preserved for template in concept.preserved_templates]
    for prompt in preserved if tokens == "last" else ["", *preserved]:
        text, last = embeddings(model, prompt)
        kept += [text[last]] if tokens == "last" else list(text)
    return {
        name: oracle.edit_matrix(weight, pairs, kept, ridge, erase_scale, preserve_scale)
        for name, weight in key_value_weights(model).items()
    }


def assert_close(model, edit, expected, tolerance):
    with edit.applied(model):
        edited = scope_parameters(model, "xattn_kv")
        assert edited.keys() == expected.keys()
        for name, weight in edited.items():
            assert (weight - expected[name]).norm() <= tolerance * expected[name].norm()


@torch.no_grad()
@pytest.mark.parametrize("anchor", ["a picture", "a picture of something rather long", ""])
@pytest.mark.parametrize(
    "config",
    [UCE(), UCE(tokens="from_last"), UCE("last", 0.1, 2.0, 0.5), UCE("from_last", 0.2, 3.0, 0.7)],
    ids=["2025", "2023", "2025 scaled", "2023 scaled"],
)
def test_every_matrix_is_the_papers_closed_form(tiny_model64, config, anchor):
    concept = dataclasses.replace(CONCEPT, anchor=anchor)
    expected = expected_weights(tiny_model64, concept, **dataclasses.asdict(config))

    edit = config.erase(tiny_model64, concept, Off(), seed=0).edit

    assert_close(tiny_model64, edit, expected, 1e-9)
    assert all((weight - expected[name]).norm() > 0.01 for name, weight in key_value_weights(tiny_model64).items())


@torch.no_grad()
def test_an_anchor_of_its_own_stands_in_for_the_concepts(tiny_model64):
    own, concepts = UCE(anchor="art"), UCE()

    edit = own.erase(tiny_model64, CONCEPT, Off(), seed=0).edit

    wanted = concepts.erase(tiny_model64, dataclasses.replace(CONCEPT, anchor="art"), Off(), seed=0).edit
    with wanted.applied(tiny_model64):
        expected = {name: weight.clone() for name, weight in key_value_weights(tiny_model64).items()}
    assert_close(tiny_model64, edit, expected, 0)


@torch.no_grad()
@pytest.mark.parametrize(("preserved", "scale"), [(CONCEPT.preserved, 1 / 5), (CONCEPT.preserved * 6, 0.1), ((), 1.0)])
def test_preserve_scale_of_2023_falls_with_the_number_of_phrases_to_a_tenth(tiny_model64, preserved, scale):
    concept = dataclasses.replace(CONCEPT, preserved=preserved)
    settings = {"tokens": "from_last", "ridge": 0.5, "erase_scale": 1.0}
    expected = expected_weights(tiny_model64, concept, **settings, preserve_scale=scale)

    edit = UCE(**settings, preserve_scale=None).erase(tiny_model64, concept, Off(), seed=0).edit

    assert_close(tiny_model64, edit, expected, 1e-9)


@torch.no_grad()
def test_float32_model_gets_the_float64_answer(tiny_model, tiny_model64):
    expected = expected_weights(tiny_model64, CONCEPT, **dataclasses.asdict(UCE()))

    assert_close(tiny_model, UCE().erase(tiny_model, CONCEPT, Off(), seed=0).edit, expected, 1e-4)


def test_costs_no_unet_evaluation_and_leaves_the_model_alone(tiny_model):
    fingerprint = tiny_model.fingerprint()

    erasure = UCE().erase(tiny_model, CONCEPT, Off(), seed=0)

    assert erasure.unet_evaluations == tiny_model.unet_evaluations == 0
    assert erasure.losses == []
    assert tiny_model.fingerprint() == fingerprint == erasure.edit.metadata["base"]
    assert erasure.edit.metadata["method"] == "UCE"
    assert erasure.edit.metadata["scope"] == "xattn_kv"


def test_seed_changes_nothing(tiny_model):
    one, other = (UCE().erase(tiny_model, CONCEPT, Off(), seed=seed).edit for seed in (0, 1))
    name = next(iter(one.entries))

    assert torch.equal(one.entries[name].parts["T"], other.entries[name].parts["T"])


def test_a_hundred_concepts_at_the_width_of_stable_diffusion_take_2_seconds_and_3_mb(tmp_path):
    generator = torch.Generator().manual_seed(0)
    erased, anchors, kept = (torch.randn(100 * 77, 768, generator=generator) for _ in range(3))
    shapes = [width for width in (320, 640, 1280) for _ in range(10)] + [1280] * 2
    weights = {f"layer_{index}": torch.empty(width, 768, device="meta") for index, width in enumerate(shapes)}
    start = time.process_time()

    right = right_multiplication([Term(erased, anchors, 1.0), Term.keeping(kept, 0.1)], 0.5)
    Edit.from_right_multiplication(right, weights).save(tmp_path / "edit.safetensors")

    assert time.process_time() - start < 4  # core-seconds: two cores for 2 s
    assert (tmp_path / "edit.safetensors").stat().st_size <= 3_000_000


@torch.no_grad()
@pytest.mark.parametrize("pruning", [Magnitude(Sparsity(0.5)), Random(Sparsity(0.5))], ids=["magnitude", "random"])
def test_scored_pruning_acts_on_the_erased_weights(tiny_model, pruning):
    erased = UCE().erase(tiny_model, CONCEPT, Off(), seed=0).edit
    with erased.applied(tiny_model):
        weights = {name: weight.clone() for name, weight in scope_parameters(tiny_model, "xattn_kv").items()}
        masks = pruning.prune(tiny_model, CONCEPT, None, scope="xattn_kv", seed=0, checkpoint=None).edit.masks()

    both = UCE().erase(tiny_model, CONCEPT, pruning, seed=0).edit

    with both.applied(tiny_model):
        for name, weight in scope_parameters(tiny_model, "xattn_kv").items():
            assert torch.equal(weight, weights[name] * masks[name])


def test_pruning_that_learns_is_refused(tiny_model):
    with pytest.raises(ValueError, match="eraser 'UCE' has none"):
        UCE().erase(tiny_model, CONCEPT, Learned(), seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ridge": 0.0}, "greater than 0"),
        ({"erase_scale": -1.0}, "greater than 0"),
        ({"preserve_scale": -1.0}, "greater than or equal to 0"),
        ({"tokens": "first"}, "'last' or 'from_last'"),
        ({"steps": 3}, "Unexpected keyword"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_loaded(changes, message):
    with pytest.raises(ValueError, match=message):
        UCE(**changes)


@pytest.mark.parametrize("eraser", ["uce", "rece"])
@torch.backends.mkldnn.flags(enabled=True)
def test_style_goes_from_the_canvas_and_the_rest_stays(monkeypatch, eraser):
    monkeypatch.chdir(Path(__file__).parents[1])
    job = make_job(f"eraser={eraser}", "concept=van_gogh")
    model = load_model("canvas")
    rows, retained = (
        read_prompt_set(Path(f"prompts/canvas/van_gogh{name}_validation.csv"), 8) for name in ("", "_retained")
    )
    prompts = [*rows, *retained]

    with job.eraser.erase(model, job.concept, job.pruning, seed=0).edit.applied(model):
        pictures = model.generate(
            [row.prompt for row in prompts],
            seeds=[row.seed for row in prompts],
            guidance=[row.guidance for row in prompts],
            steps=20,
        )

    # The unedited model shows the style in all eight.
    assert job.judge(pictures[:8]).present.sum() <= 4
    assert all(rate.successes >= 6 for rate in RetainedAccuracy().rates(pictures[8:], retained).values())
