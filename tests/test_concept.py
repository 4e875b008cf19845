"""A concept's prompts, and those of several concepts erased together."""

import dataclasses
from pathlib import Path

from erasure.concept import Concept
from tests.tiny_job import make_job

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
