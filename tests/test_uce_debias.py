"""UCE that debiases: against its formula matrix by matrix, with given strengths and with found ones; many concepts."""

import dataclasses
from pathlib import Path

import pytest
import torch

from diffusion.loading import load_model
from diffusion.streams import derived_seed
from erasure.closed_form import key_value_weights
from erasure.concept import Concept
from erasure.erasers.rece import RECE
from erasure.erasers.uce import UCE, Debias
from erasure.parameters import scope_parameters
from erasure.pruning.magnitude import Magnitude
from erasure.pruning.off import Off
from evaluation.verdicts import Verdicts
from tests.erasures import assert_same_erasure
from tests.night import nightly
from tests.oracles import uce as oracle
from tests.tiny_job import make_job

CONCEPT = Concept(
    "doctor",
    "object",
    targets=("a doctor", "someone who heals"),
    templates=("{}", "a picture of {} in the snow"),
    preserved=("a fish", "a church in the snow"),
    also=(Concept("nurse", "object", targets=("a nurse",), preserved=("a house",)),),
)
ATTRIBUTES = ("a red {}", "blue", "{}, made of glass and stone")
WIDE = {"tokens": "from_last", "ridge": 0.2, "erase_scale": 3.0, "preserve_scale": 0.7}


def lightness(images):
    return images.double().mean(dim=(1, 2, 3)) / 255


@dataclasses.dataclass(frozen=True)
class Light:
    """How sure it is that a picture is lighter, or darker, than ``than``; never quite."""

    than: float = 0.5
    darker: bool = False

    def __call__(self, images):
        score = (lightness(images) - self.than) / 2 + 0.5
        return Verdicts(score > 0.5, 1 - score if self.darker else score)


def embeddings(model, prompt):
    ids = model.tokenize([prompt])[0].tolist()
    return model.encode([prompt])[0], oracle.last_token(ids, model.tokenizer.eos_token_id)


def expected_weights(model, strengths, uce):
    """Every matrix by the formula; ``strengths`` by concept."""
    pairs, kept = [], [] if uce.tokens == "last" else list(model.encode([""])[0])
    for concept, row in zip((CONCEPT, *CONCEPT.also), strengths, strict=True):
        for target in concept.targets:
            for template in concept.templates:
                attributes = [template.format(attribute.format(target)) for attribute in ATTRIBUTES]
                texts = [embeddings(model, prompt) for prompt in (template.format(target), *attributes)]
                pairs += oracle.debiasing_pairs(texts, row, 1 if uce.tokens == "last" else None)
        for phrase in concept.preserved:
            text, last = embeddings(model, phrase)
            kept += [text[last]] if uce.tokens == "last" else list(text)
    return {
        name: oracle.edit_matrix(weight, pairs, kept, uce.ridge, uce.erase_scale, uce.preserve_scale)
        for name, weight in key_value_weights(model).items()
    }


def assert_close(model, edit, expected):
    with edit.applied(model):
        for name, weight in scope_parameters(model, "xattn_kv").items():
            assert (weight - expected[name]).norm() <= 1e-9 * expected[name].norm()


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, WIDE], ids=["last", "from_last"])
def test_given_strengths_make_a_closed_form(tiny_model64, settings):
    uce = UCE(**settings, debias=Debias(ATTRIBUTES, strengths=(0.3, -0.2, 0.5)))

    erasure = uce.erase(tiny_model64, CONCEPT, Off(), seed=0)

    assert erasure.unet_evaluations == tiny_model64.unet_evaluations == 0
    assert_close(tiny_model64, erasure.edit, expected_weights(tiny_model64, [(0.3, -0.2, 0.5)] * 2, uce))


ITERATING = Debias(
    ATTRIBUTES,
    judges=(Light(), Light(0.47, darker=True), Light(0.52)),
    shares=(0.5, 0.25, 0.25),
    step=0.8,
    rounds=3,
    pictures=4,
    sampling_steps=2,
    guidance=2.0,
)
FIRST = (Light(-9.0), Light(9.0), Light(9.0))
"""The first attribute shows in every picture."""


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, WIDE], ids=["last", "from_last"])
def test_strengths_follow_the_shares_of_the_pictures_round_by_round(tiny_model64, settings):
    model = tiny_model64
    uce = UCE(**settings, debias=ITERATING)
    erasure = uce.erase(model, CONCEPT, Off(), seed=3)

    strengths, settled, seen = [[0.0] * 3, [0.0] * 3], {}, [[], []]
    for number in range(3):
        expected = expected_weights(model, strengths, uce)
        base = {name: weight.clone() for name, weight in key_value_weights(model).items()}
        for name, weight in expected.items():
            model.network.get_parameter(name).copy_(weight)
        for place, concept in enumerate((CONCEPT, *CONCEPT.also)):
            if place in settled:
                continue
            prompts = [template.format(target) for target in concept.targets for template in concept.templates]
            own = derived_seed(3, "uce/pictures", number, place)
            shown = oracle.shown(model, prompts, ITERATING.judges, 4, 2, 2.0, seed=own)
            seen[place] = [shown.count(attribute) / 4 for attribute in range(3)]
            gaps = [wanted - share for wanted, share in zip((0.5, 0.25, 0.25), seen[place], strict=True)]
            if max(map(abs, gaps)) <= 0.05:
                settled[place] = number
            elif number < 2:
                strengths[place] = [a + 0.8 * gap for a, gap in zip(strengths[place], gaps, strict=True)]
        for name, weight in base.items():
            model.network.get_parameter(name).copy_(weight)

    assert any(any(row) for row in strengths)
    for row, other in zip(erasure.edit.metadata["strengths"], strengths, strict=True):
        assert row == pytest.approx(other)
    assert erasure.edit.metadata["shares"] == seen
    assert_close(model, erasure.edit, expected)


def test_a_concept_that_shows_the_wanted_shares_is_left_and_makes_no_more_pictures(tiny_model):
    always = dataclasses.replace(ITERATING, judges=FIRST, shares=(1.0, 0.0, 0.0))

    erasure = UCE(debias=always).erase(tiny_model, CONCEPT, Off(), seed=0)

    assert erasure.edit.metadata["strengths"] == [[0.0] * 3] * 2
    assert erasure.unet_evaluations == tiny_model.unet_evaluations == 2 * 4 * 2 * 2
    [right] = {id(entry.parts["T"]): entry.parts["T"] for entry in erasure.edit.entries.values()}.values()
    assert torch.equal(right, torch.eye(32))


def test_rounds_end_and_cost_what_they_say(tiny_model):
    never = dataclasses.replace(ITERATING, judges=FIRST, shares=(0.0, 0.5, 0.5))

    erasure = UCE(debias=never).erase(tiny_model, CONCEPT, Off(), seed=0)

    # Three rounds of four pictures of two guided steps for each of two concepts.
    assert erasure.unet_evaluations == tiny_model.unet_evaluations == 3 * 2 * 4 * 2 * 2
    for row in erasure.edit.metadata["strengths"]:
        assert row == pytest.approx([2 * 0.8 * gap for gap in (-1.0, 0.5, 0.5)])


def test_a_killed_run_ends_as_an_undisturbed_one(tiny_model, tmp_path):
    class Killed(Exception):
        pass

    uce = UCE(debias=dataclasses.replace(ITERATING, judges=FIRST))
    undisturbed = uce.erase(tiny_model, CONCEPT, Off(), seed=0)
    original, calls = tiny_model.decode, 0

    def dying(latents, **named):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise Killed
        return original(latents, **named)

    base = {name: weight.clone() for name, weight in key_value_weights(tiny_model).items()}
    tiny_model.decode = dying
    with pytest.raises(Killed):
        uce.erase(tiny_model, CONCEPT, Off(), seed=0, checkpoint=tmp_path / "work")
    tiny_model.decode = original
    assert all(torch.equal(weight, base[name]) for name, weight in key_value_weights(tiny_model).items())
    spent = tiny_model.unet_evaluations

    assert_same_erasure(uce.erase(tiny_model, CONCEPT, Off(), seed=0, checkpoint=tmp_path / "work"), undisturbed)
    assert tiny_model.unet_evaluations - spent == undisturbed.unet_evaluations // 3


def test_pictures_at_a_time_change_nothing(tiny_model64):
    one, other = (
        UCE(debias=dataclasses.replace(ITERATING, sampling_batch_size=size)).erase(tiny_model64, CONCEPT, Off(), seed=0)
        for size in (1, 4)
    )

    assert one.edit.metadata["strengths"] == other.edit.metadata["strengths"]
    assert one.unet_evaluations == other.unet_evaluations


def test_scored_pruning_follows(tiny_model):
    uce = UCE(debias=Debias(ATTRIBUTES, strengths=(0.3, -0.2, 0.5)))

    assert uce.erase(tiny_model, CONCEPT, Magnitude(), seed=0).edit.metadata["pruned_weights"] > 0


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, nightly(WIDE)], ids=["last", "from_last"])
def test_hundreds_of_concepts_are_erased_at_once_by_the_formula(tiny_model64, settings):
    names = [f"{colour} {thing} {number}" for number in range(20) for colour in ("red", "blue") for thing in "abcde"]
    first, *others = [
        Concept(name, "object", targets=(name,), anchor=anchor, preserved=(f"a {name[:6]}",))
        for name, anchor in zip(names, ["a picture", "", "a fish"] * 67, strict=False)
    ]
    together = dataclasses.replace(first, also=tuple(others))
    uce = UCE(**settings)
    pairs, kept = [], [] if uce.tokens == "last" else list(tiny_model64.encode([""])[0])
    for concept in (first, *others):
        rule = oracle.pairs_2025 if uce.tokens == "last" else oracle.pairs_2023
        pairs += rule(*embeddings(tiny_model64, concept.targets[0]), *embeddings(tiny_model64, concept.anchor))
        text, last = embeddings(tiny_model64, concept.preserved[0])
        kept += [text[last]] if uce.tokens == "last" else list(text)
    name, weight = next(iter(key_value_weights(tiny_model64).items()))
    expected = oracle.edit_matrix(weight, pairs, kept, uce.ridge, uce.erase_scale, uce.preserve_scale)

    edit = uce.erase(tiny_model64, together, Off(), seed=0).edit

    assert len(together.parts) == 200
    assert len(edit.entries) == len(key_value_weights(tiny_model64))
    assert edit.size_bytes == 32 * 32 * 8
    with edit.applied(tiny_model64):
        edited = tiny_model64.network.get_parameter(name)
        assert (edited - expected).norm() <= 1e-8 * expected.norm()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "debias has neither of strengths and judges; give the strengths, or judges to find them"),
        ({"strengths": (1, 2), "judges": (Light(),) * 2}, "debias has both of strengths and judges"),
        ({"strengths": (1,)}, "debias.strengths has 1 values and debias.attributes 2; give one for each"),
        ({"judges": (Light(),) * 2, "shares": (0.5, 0.4)}, r"debias.shares is \[0.5, 0.4\], 0.9 in sum; it must be 1"),
        ({"judges": (Light(),) * 2, "rounds": 0}, "greater than or equal to 1"),
        ({"judges": (3, 4)}, "callable"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Debias(("a", "b"), **changes)


def test_one_attribute_and_an_erasure_after_it_are_refused():
    with pytest.raises(ValueError, match="at least 2"):
        Debias(("a",), strengths=(1.0,))
    with pytest.raises(ValueError, match=r"uce.debias is set and RECE follows an erasure; set uce.debias=null"):
        RECE(uce=UCE(debias=Debias(("a", "b"), strengths=(1, 2))))


@pytest.mark.slow
@torch.backends.mkldnn.flags(enabled=True)
def test_churches_of_the_canvas_are_photos_no_more_often_than_stained_glass(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    job = make_job("eraser=uce_debias", "concept=church", 'concept.templates=["{}"]')
    model = load_model("canvas")
    prompts = (job.concept.target_prompts * 10)[:48]

    def styles_and_churches():
        pictures = model.generate(prompts, seeds=list(range(1000, 1048)), guidance=[5.0] * 48, steps=20)
        shares = [judge(pictures).present.double().mean().item() for judge in job.eraser.debias.judges]
        return shares, job.judge(pictures).present.double().mean().item()

    [photo, glass], church = styles_and_churches()
    assert photo > 0.75 and glass < 0.15
    erasure = job.eraser.erase(model, job.concept, job.pruning, seed=0)
    with erasure.edit.applied(model):
        [photo, glass], still_church = styles_and_churches()

    assert abs(photo - glass) < 0.35
    assert photo + glass > 0.6
    assert still_church > church - 0.1


def test_the_canvas_preset_names_every_field():
    job = make_job("eraser=uce_debias", "concept=church")

    assert isinstance(job.eraser, UCE)
    assert isinstance(job.eraser.debias, Debias)
    assert set(job.config["eraser"]["debias"]) - {"_target_"} == {field.name for field in dataclasses.fields(Debias)}
