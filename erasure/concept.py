"""What is to be erased, what it should become, and what must stay."""

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from diffusion.checked import checked
from diffusion.files import shipped

ConceptKind = Literal["style", "object", "unsafe"]


def _with_place(template: str) -> str:
    if "{}" not in template:
        raise ValueError(f"{template!r} has no {{}}; every template must contain it, the phrase's place.")
    return template


def _not_blank(phrase: str) -> str:
    if not phrase.strip():
        raise ValueError(f"{phrase!r} is blank; every target must be a phrase that names the concept.")
    return phrase


Target = Annotated[str, AfterValidator(_not_blank)]
Template = Annotated[str, AfterValidator(_with_place)]

ShippedPath = Annotated[Path, AfterValidator(shipped)]
"""A path, which may be that of a file of the project from any working folder."""


@checked
class Concept:
    """A concept as an eraser sees it.

    Attributes:
        name: What results call it.
        kind: Which of the field's three tasks it belongs to.
        targets: Phrases that name it ("van gogh style"); an eraser may use one or all.
        anchor: What a target should turn into, as a phrase; empty for the unconditional prediction.
        templates: Contexts that targets and anchor are put in, at ``{}``.
        preserved: Phrases of concepts that must stay; erasers and pruning with a retain term use them.
        preserved_templates: Contexts that preserved phrases are put in.
        prompts: CSV of prompts that ask for the concept.
        retained_prompts: CSV of prompts that must keep working.
        pairs: CSV of prompts with the concept beside the same prompts without it; attacks that need its direction
            among text embeddings use them.
        also: Concepts that are erased together with this one, each with targets, anchor, templates and preserved
            phrases of its own; their files are not read.

    Raises:
        ValueError: A target is blank, a template has no place for a phrase, or a phrase is both a target and preserved.
    """

    name: str
    kind: ConceptKind
    targets: Annotated[tuple[Target, ...], Field(min_length=1)]
    anchor: str = ""
    templates: Annotated[tuple[Template, ...], Field(min_length=1)] = ("{}",)
    preserved: tuple[str, ...] = ()
    preserved_templates: Annotated[tuple[Template, ...], Field(min_length=1)] = ("{}",)
    prompts: ShippedPath | None = None
    retained_prompts: ShippedPath | None = None
    pairs: ShippedPath | None = None
    also: tuple["Concept", ...] = ()

    @model_validator(mode="after")
    def _targets_are_not_preserved(self) -> "Concept":
        parts = list(self._with_others())
        targets = {_normal(target) for part in parts for target in part.targets}
        for part in parts:
            for phrase in part.preserved:
                if _normal(phrase) in targets:
                    raise ValueError(
                        f"{phrase!r} is among preserved and among targets of {self.name}; a phrase is either erased or "
                        "kept: take it out of one of them."
                    )
        return self

    def _with_others(self) -> Iterator["Concept"]:
        yield self
        for concept in self.also:
            yield from concept._with_others()

    def as_anchor(self) -> "Concept":
        """The concept with its anchor, which may be empty, in the place of its targets."""
        anchor = copy(self)
        # An empty target is refused where a concept is made.
        object.__setattr__(anchor, "targets", (self.anchor,))
        return anchor

    @property
    def parts(self) -> tuple["Concept", ...]:
        """The concept itself and those erased together with it, one by one."""
        return tuple((replace(part, also=()) if part.also else part) for part in self._with_others())

    @property
    def target_prompts(self) -> list[str]:
        """Every target in every template, concept by concept and target by target."""
        return [prompt for part in self.parts for prompt in _filled(part.targets, part.templates)]

    @property
    def anchor_prompts(self) -> list[str]:
        """The anchor in every template, concept by concept."""
        return [prompt for part in self.parts for prompt in _filled([part.anchor], part.templates)]

    @property
    def target_anchors(self) -> list[str]:
        """For every target prompt its concept's anchor in the same template."""
        return [prompt for part in self.parts for prompt in _filled([part.anchor], part.templates) * len(part.targets)]

    @property
    def turns(self) -> list[tuple[str, str]]:
        """Target prompts with their anchors as training takes them: concepts in turn, each starting over at its end."""
        pairs = [list(zip(part.target_prompts, part.target_anchors, strict=True)) for part in self.parts]
        return [part[number % len(part)] for number in range(max(map(len, pairs))) for part in pairs]

    @property
    def preserved_prompts(self) -> list[str]:
        """Every preserved phrase in every one of its templates, concept by concept and phrase by phrase."""
        return [prompt for part in self.parts for prompt in _filled(part.preserved, part.preserved_templates)]

    def anchored(self, anchor: str) -> "Concept":
        """The same, with ``anchor`` for the anchor of all its concepts."""
        return replace(self, anchor=anchor, also=tuple(part.anchored(anchor) for part in self.also))

    @property
    def in_preserved_contexts(self) -> "Concept":
        """The same, with the targets in the templates of what is preserved."""
        also = tuple(part.in_preserved_contexts for part in self.also)
        return replace(self, templates=self.preserved_templates, also=also)


def _normal(phrase: str) -> str:
    return " ".join(phrase.casefold().split())


def _filled(phrases: Sequence[str], templates: Sequence[str]) -> list[str]:
    return [template.replace("{}", phrase) for phrase in phrases for template in templates]
