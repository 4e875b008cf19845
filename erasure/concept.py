"""What is to be erased, what it should become, and what must stay."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

ConceptKind = Literal["style", "object", "unsafe"]


def _with_place(template: str) -> str:
    if "{}" not in template:
        raise ValueError(f"{template!r} has no {{}}; every template must contain it, the phrase's place.")
    return template


Template = Annotated[str, AfterValidator(_with_place)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
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
    """

    name: str
    kind: ConceptKind
    targets: tuple[str, ...] = Field(min_length=1)
    anchor: str = ""
    templates: Annotated[tuple[Template, ...], Field(min_length=1)] = ("{}",)
    preserved: tuple[str, ...] = ()
    preserved_templates: Annotated[tuple[Template, ...], Field(min_length=1)] = ("{}",)
    prompts: Path | None = None
    retained_prompts: Path | None = None
    pairs: Path | None = None

    @property
    def target_prompts(self) -> list[str]:
        """Every target in every template, target by target."""
        return _filled(self.targets, self.templates)

    @property
    def anchor_prompts(self) -> list[str]:
        """The anchor in every template."""
        return _filled([self.anchor], self.templates)

    @property
    def target_anchors(self) -> list[str]:
        """For every target prompt the anchor in the same template."""
        return self.anchor_prompts * len(self.targets)

    @property
    def preserved_prompts(self) -> list[str]:
        """Every preserved phrase in every one of its templates, phrase by phrase."""
        return _filled(self.preserved, self.preserved_templates)


def _filled(phrases: Sequence[str], templates: Sequence[str]) -> list[str]:
    return [template.replace("{}", phrase) for phrase in phrases for template in templates]
