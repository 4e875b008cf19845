"""A concept's prompts, and those of several concepts erased together."""

import dataclasses
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from attacks.prompt_pairs import read_pairs
from erasure.concept import Concept
from tests.tiny_job import CONFIG_FOLDER, make_job

GOGH = Concept("van_gogh", "style", targets=("van gogh", "vincent"), anchor="a picture", preserved=("a fish",))
CHURCH = Concept(
    "church",
    "object",
    targets=("church",),
    anchor="house",
    templates=("{}", "a red {}", "big {}"),
    preserved=("car",),
    preserved_templates=("{}", "a red {}"),
)
BOTH = dataclasses.replace(GOGH, name="both", also=(CHURCH,))


def test_every_concept_has_its_own_anchor_templates_and_preserved_phrases():
    assert BOTH.target_prompts == ["van gogh", "vincent", "church", "a red church", "big church"]
    assert BOTH.target_anchors == ["a picture", "a picture", "house", "a red house", "big house"]
    assert BOTH.anchor_prompts == ["a picture", "house", "a red house", "big house"]
    assert BOTH.preserved_prompts == ["a fish", "car", "a red car"]


def test_parts_are_the_concepts_one_by_one_however_deep():
    deep = dataclasses.replace(GOGH, also=(dataclasses.replace(CHURCH, also=(GOGH,)),))

    assert deep.parts == (GOGH, CHURCH, GOGH)


def test_targets_move_into_the_contexts_of_what_is_preserved_concept_by_concept():
    assert BOTH.in_preserved_contexts.target_prompts == ["van gogh", "vincent", "church", "a red church"]
    assert BOTH.in_preserved_contexts.preserved_prompts == BOTH.preserved_prompts


def test_concepts_take_turns_in_training_and_the_shorter_starts_over():
    assert [target for target, _ in BOTH.turns] == [
        "van gogh",
        "church",
        "vincent",
        "a red church",
        "van gogh",
        "big church",
    ]
    anchors = dict(zip(BOTH.target_prompts, BOTH.target_anchors, strict=True))
    assert all(anchor == anchors[target] for target, anchor in BOTH.turns)
    assert [target for target, _ in CHURCH.turns] == CHURCH.target_prompts


def test_the_canvas_job_of_two_concepts_erases_both_and_keeps_neither(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    concept = make_job("concept=van_gogh_church").concept

    assert [part.name for part in concept.parts] == ["van_gogh_church", "church"]
    assert {"by vincent van gogh", "a pencil sketch of a cathedral"} <= set(concept.target_prompts)
    assert "a parachute, pixel art" in concept.preserved_prompts
    assert not any("church" in prompt or "gogh" in prompt for prompt in concept.preserved_prompts)


def test_both_tasks_of_the_job_of_two_concepts_stand_on_one_edit(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    style = make_job("concept=van_gogh_church").config
    command = ["concept.prompts=prompts/canvas/church.csv", "judge.head=subject", "judge.label=church"]
    church = make_job("concept=van_gogh_church", *command).config

    style["concept"].pop("prompts"), church["concept"].pop("prompts")
    assert style["concept"] == church["concept"]
    assert style["eraser"] == church["eraser"]


CONCEPTS = CONFIG_FOLDER / "concept"
KINDS = {"artist": ("style", "style"), "object": ("object", "object")} | dict.fromkeys(
    ("celebrity", "character"), ("object", "clip_zeroshot")
)
NOT_IN_WIKIART = {"rutkowski", "mckernan", "kinkade", "edlin", "eng", "ajin_demi_human"}
UNSAFE = {"nudity": "nudenet", "violence": "q16", "illegal": "q16"}
STABLE_DIFFUSION = [
    *UNSAFE,
    "nudity_violence",
    *(path.relative_to(CONCEPTS).with_suffix("").as_posix() for path in sorted(CONCEPTS.glob("*/*.yaml"))),
]
ALL = ("judge=canvas", "judge.head=style", "judge.label=van_gogh", "tracker=off", "prompts=1000", "retained=1000")
"""Whatever the concept's own judge needs, and every row of its files."""


@pytest.fixture
def at_root(monkeypatch):
    monkeypatch.chdir(CONFIG_FOLDER.parent)


@pytest.mark.parametrize("choice", STABLE_DIFFUSION)
def test_a_concept_of_stable_diffusion_is_asked_for_by_its_prompts_and_by_no_retained_one(choice, at_root):
    job = make_job(f"concept={choice}", *ALL)
    folder, _, name = choice.rpartition("/")
    phrases = [phrase.lower() for part in job.concept.parts for phrase in part.targets]

    assert job.concept.name == name
    assert job.concept.kind == (KINDS[folder][0] if folder else "unsafe")
    assert len(job.prompts) == 20
    assert len(job.retained) == 40
    assert len({row.seed for row in job.prompts}) == 20
    assert not any("{}" in row.prompt for row in (*job.prompts, *job.retained))
    if folder:
        assert all(job.concept.targets[0] in row.prompt for row in job.prompts)
    kept = [*(row.prompt for row in job.retained), *job.concept.preserved, *job.concept.preserved_prompts]
    assert not any(phrase in prompt.lower() for phrase in phrases for prompt in kept)


@pytest.mark.parametrize("choice", STABLE_DIFFUSION)
def test_a_concept_of_stable_diffusion_names_the_judge_of_its_kind_and_every_field(choice):
    folder, _, name = choice.rpartition("/")
    written = OmegaConf.load(CONCEPTS / f"{choice}.yaml")
    if name in {"five_famous", "nudity_violence"}:
        assert written.defaults == [{"five_famous": "artist/van_gogh", "nudity_violence": "nudity"}[name], "_self_"]
        return
    judge = "style_clip" if name in NOT_IN_WIKIART else KINDS[folder][1] if folder else UNSAFE[name]
    assert written.defaults == [{"/judge": judge}, "_self_"]
    assert set(written.concept) - {"_target_"} == {field.name for field in dataclasses.fields(Concept)}


def test_pairs_of_stable_diffusion_differ_in_the_concept():
    written = {choice: OmegaConf.load(CONCEPTS / f"{choice}.yaml").concept for choice in STABLE_DIFFUSION}
    files = {choice: concept.pairs for choice, concept in written.items() if concept.get("pairs")}
    assert {"nudity", "violence", "illegal", "artist/van_gogh", "object/church", "object/tench"} <= set(files)
    for choice, path in files.items():
        pairs = read_pairs(CONFIG_FOLDER.parent / path)
        assert len({*pairs}) == len(pairs) >= 16
        assert all(present != absent for present, absent in pairs)
        if "/" in choice:
            phrase = written[choice].targets[0]
            assert all(phrase in present and phrase not in absent for present, absent in pairs)


def test_several_concepts_of_stable_diffusion_are_erased_at_once(at_root):
    famous = make_job("concept=artist/five_famous", *ALL).concept
    assert famous.target_prompts == ["Van Gogh", "Pablo Picasso", "Rembrandt", "Andy Warhol", "Caravaggio"]
    assert set(famous.anchor_prompts) == {"painting"}

    both = make_job("concept=nudity_violence", *ALL).concept
    assert both.target_prompts == ["nudity", "violence"]
    assert both.anchor_prompts == ["a person wearing clothes", ""]


@pytest.mark.parametrize("targets", [("",), ("church", "  ")])
def test_a_blank_target_is_refused(targets: tuple[str, ...]):
    with pytest.raises(ValueError, match="is blank; every target must be a phrase"):
        Concept("church", "object", targets=targets)


def test_a_phrase_is_either_erased_or_kept():
    with pytest.raises(ValueError, match="'A  Church' is among preserved and among targets of church"):
        Concept("church", "object", targets=("a church", "chapel"), preserved=("a dog", "A  Church"))
    other = Concept("fire", "unsafe", targets=("fire",), preserved=("church",))
    with pytest.raises(ValueError, match="'church' is among preserved"):
        Concept("church", "object", targets=("church",), also=(other,))
    assert Concept("church", "object", targets=("church",), preserved=("", "church tower")).preserved[0] == ""
