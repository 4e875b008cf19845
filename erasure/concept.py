"""What is to be erased, what it should become, and what must stay."""

from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

ConceptKind = Literal["style", "object", "unsafe"]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Concept:
    """A concept as an eraser sees it.

    Attributes:
        name: What results call it.
        kind: Which of the field's three tasks it belongs to.
        targets: Phrases that name it ("van gogh style"); an eraser may use one or all.
        anchor: What a target should turn into, as a phrase; empty for the unconditional prediction.
        preserved: Phrases of concepts that must stay; erasers and pruning with a retain term use them.
        prompts: CSV of prompts that ask for the concept.
        retained_prompts: CSV of prompts that must keep working.
    """

    name: str
    kind: ConceptKind
    targets: tuple[str, ...] = Field(min_length=1)
    anchor: str = ""
    preserved: tuple[str, ...] = ()
    prompts: Path | None = None
    retained_prompts: Path | None = None
