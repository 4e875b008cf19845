"""Builds the prompt sets under ``prompts/canvas``: what erasing must remove, and what it must leave alone.

``python -m diffusion.canvas.prompt_sets`` rewrites the files; equal code gives equal files.
"""

import argparse
import math
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from diffusion.canvas.captions import Fire, caption
from diffusion.canvas.phrases import FIRE_EXPLICIT, STYLE_PHRASES, SUBJECT_PHRASES
from diffusion.canvas.world import STYLES, SUBJECTS, Scene, random_scene
from diffusion.files import write_atomically
from diffusion.text_files import csv_text

EVALUATION_GUIDANCE = 5.0
COLUMNS = (
    "case_number",
    "prompt",
    "evaluation_seed",
    "evaluation_guidance",
    "style",
    "subject",
    "burning",
)
CONCEPTS = ("van_gogh", "church", "fire")
TEST_SIZES = {"concept": 96, "retained": 160}
VALIDATION_SIZES = {"concept": 48, "retained": 96}
PAIRS = 30
PAIR_COLUMNS = ("with", "without")

SHIPPED_FOLDER = Path(__file__).resolve().parents[2] / "prompts" / "canvas"

_TEST_SEED = 20240501
_VALIDATION_SEED = 20240502
_PAIR_SEED = 20240503


@dataclass(frozen=True)
class PromptRow:
    """One prompt with its evaluation settings and the ground truth of what it asks for."""

    case_number: int
    prompt: str
    evaluation_seed: int
    evaluation_guidance: float
    style: str
    subject: str
    burning: bool

    def cells(self) -> tuple[str, ...]:
        """Return the row as CSV cells in the order of ``COLUMNS``; ``burning`` becomes 0 or 1."""
        values = {**asdict(self), "burning": int(self.burning)}
        return tuple(str(values[column]) for column in COLUMNS)


def concept_prompts(
    concept: str, size: int, generator: np.random.Generator, *, excluded: Set[str] = frozenset()
) -> list[PromptRow]:
    """Return prompts that ask for a concept, balanced over the other properties.

    Half of the prompts for ``"fire"`` name it and half only imply it; no other prompt burns.

    Args:
        concept: One of ``CONCEPTS``.
        size: Number of prompts.
        generator: Source of all choices.
        excluded: Prompts that must not occur.

    Raises:
        ValueError: ``concept`` is unknown.

    """
    styles, subjects = _styles_and_subjects(concept)
    if concept != "fire":
        return _build_rows(_balanced_pairs(styles, subjects, size), [None] * size, generator, excluded)
    explicit_size = (size + 1) // 2
    pairs = [
        *_balanced_pairs(styles, subjects, explicit_size),
        *_balanced_pairs(styles, subjects, size - explicit_size),
    ]
    fires: list[Fire | None] = ["explicit" if index < explicit_size else "implicit" for index in range(size)]
    return _build_rows(pairs, fires, generator, excluded)


def retained_prompts(
    concept: str, size: int, generator: np.random.Generator, *, excluded: Set[str] = frozenset()
) -> list[PromptRow]:
    """Return prompts without a concept, balanced over the remaining styles and subjects; none burns.

    Args:
        concept: One of ``CONCEPTS``.
        size: Number of prompts.
        generator: Source of all choices.
        excluded: Prompts that must not occur.

    Raises:
        ValueError: ``concept`` is unknown.

    """
    _check_concept(concept)
    styles = tuple(style for style in STYLES if style != concept)
    subjects = tuple(subject for subject in SUBJECTS if subject != concept)
    return _build_rows(_balanced_pairs(styles, subjects, size), [None] * size, generator, excluded)


def prompt_pairs(concept: str, size: int, generator: np.random.Generator) -> list[tuple[str, str]]:
    """Return captions that name a concept beside the same captions without it, balanced as in ``concept_prompts``.

    Without it, a style becomes ``a picture of`` or is not told, a subject becomes another, and fire is not told.

    Args:
        concept: One of ``CONCEPTS``.
        size: Number of pairs.
        generator: Source of all choices.

    Raises:
        ValueError: ``concept`` is unknown.

    """
    styles, subjects = _styles_and_subjects(concept)
    others = [subject for subject in SUBJECTS if subject != concept]
    pairs: list[tuple[str, str]] = []
    for index, (style, subject) in enumerate(_balanced_pairs(styles, subjects, size)):
        drawn = random_scene(generator)
        scene = Scene(style, subject, concept == "fire", drawn.colour, drawn.setting, count=1)
        prompt = caption(scene, generator, fire="explicit" if scene.burning else None, fillers=False)
        replacements = {
            "van_gogh": dict.fromkeys(STYLE_PHRASES["van_gogh"].before, "a picture of")
            | {f", {phrase}": "" for phrase in STYLE_PHRASES["van_gogh"].after},
            "church": dict.fromkeys(SUBJECT_PHRASES["church"], SUBJECT_PHRASES[others[index % len(others)]][0]),
            "fire": {f"{phrase} ": "" for phrase in FIRE_EXPLICIT.before}
            | {f" {phrase}": "" for phrase in FIRE_EXPLICIT.after},
        }[concept]
        pairs.append((prompt, _replace(prompt, replacements)))
    return pairs


def build_prompt_sets() -> dict[str, list[PromptRow]]:
    """Return all shipped sets by file stem; no validation prompt occurs in any test set."""
    test = _build_split("", TEST_SIZES, _TEST_SEED, excluded=frozenset())
    test_prompts = {row.prompt for rows in test.values() for row in rows}
    return test | _build_split("_validation", VALIDATION_SIZES, _VALIDATION_SEED, excluded=test_prompts)


def write_prompt_sets(folder: Path) -> None:
    """Write every prompt set and all prompt pairs to ``folder`` as UTF-8 CSV, replacing files of the same name."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, rows in build_prompt_sets().items():
        _write_csv(folder / f"{stem}.csv", COLUMNS, [row.cells() for row in rows])
    streams = np.random.default_rng(_PAIR_SEED).spawn(len(CONCEPTS))
    for concept, stream in zip(CONCEPTS, streams, strict=True):
        _write_csv(folder / f"{concept}_pairs.csv", PAIR_COLUMNS, prompt_pairs(concept, PAIRS, stream))


def main() -> None:
    """Write the prompt sets from the command line."""
    parser = argparse.ArgumentParser(description="Write the canvas prompt sets.")
    parser.add_argument("--folder", type=Path, default=SHIPPED_FOLDER)
    write_prompt_sets(parser.parse_args().folder)


def _build_split(suffix: str, sizes: dict[str, int], seed: int, excluded: Set[str]) -> dict[str, list[PromptRow]]:
    sets: dict[str, list[PromptRow]] = {}
    # Each set has a stream of its own, so that resizing one leaves the choices of the others as they are.
    streams = np.random.default_rng(seed).spawn(2 * len(CONCEPTS))
    for index, concept in enumerate(CONCEPTS):
        concept_stream, retained_stream = streams[2 * index : 2 * index + 2]
        sets[concept + suffix] = concept_prompts(concept, sizes["concept"], concept_stream, excluded=excluded)
        sets[f"{concept}_retained{suffix}"] = retained_prompts(
            concept, sizes["retained"], retained_stream, excluded=excluded
        )
    return sets


def _balanced_pairs(styles: tuple[str, ...], subjects: tuple[str, ...], size: int) -> list[tuple[str, str]]:
    """Walk the grid of styles and subjects along diagonals: counts of each, and of pairs, differ by at most one."""
    period = math.lcm(len(styles), len(subjects))
    return [(styles[i % len(styles)], subjects[(i + i // period) % len(subjects)]) for i in range(size)]


def _build_rows(
    pairs: list[tuple[str, str]], fires: list[Fire | None], generator: np.random.Generator, excluded: Set[str]
) -> list[PromptRow]:
    rows: list[PromptRow] = []
    used = set(excluded)
    # The walk over the grid is regular; the order of the cases must not be.
    for case_number, index in enumerate(generator.permutation(len(pairs))):
        style, subject = pairs[index]
        prompt = _unused_caption(style, subject, fires[index], generator, used)
        used.add(prompt)
        rows.append(
            PromptRow(
                case_number=case_number,
                prompt=prompt,
                evaluation_seed=int(generator.integers(2**31)),
                evaluation_guidance=EVALUATION_GUIDANCE,
                style=style,
                subject=subject,
                burning=fires[index] is not None,
            )
        )
    return rows


def _unused_caption(style: str, subject: str, fire: Fire | None, generator: np.random.Generator, used: Set[str]) -> str:
    while True:
        drawn = random_scene(generator)
        scene = Scene(style, subject, fire is not None, drawn.colour, drawn.setting, drawn.count)
        prompt = caption(scene, generator, fire=fire)
        if prompt not in used:
            return prompt


def _replace(text: str, replacements: Mapping[str, str]) -> str:
    """Replace the longest phrase that occurs, and give the word after it the article that it takes."""
    phrase = max((phrase for phrase in replacements if phrase in text), key=len)
    replaced = text.replace(phrase, replacements[phrase], 1)
    return re.sub(r"\ban? (?=(\w))", lambda match: "an " if match[1] in "aeiou" else "a ", replaced)


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    write_atomically(path, csv_text(columns, rows))


def _styles_and_subjects(concept: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return those that a picture of the concept may have."""
    _check_concept(concept)
    styles = ("van_gogh",) if concept == "van_gogh" else STYLES
    subjects = ("church",) if concept == "church" else SUBJECTS
    return styles, subjects


def _check_concept(concept: str) -> None:
    if concept not in CONCEPTS:
        raise ValueError(f"unknown concept {concept!r}; expected one of {CONCEPTS}")


if __name__ == "__main__":
    main()
