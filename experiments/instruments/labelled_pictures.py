"""Pictures whose truth is known, one after the other: from a folder, from a table, or drawn on the canvas."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from diffusion.canvas.drawing import draw
from diffusion.canvas.world import STYLES, SUBJECTS, Scene, random_scene
from diffusion.streams import numpy_stream
from erasure.concept import Concept
from evaluation.picture_files import is_picture_file, neighbours, read_picture_file
from evaluation.prompt_sets import csv_rows

Labelled = tuple[Tensor, bool]
"""A picture, uint8 [3, H, W], and whether it shows the concept."""

FOLDERS = {"present": True, "absent": False}
_WORDS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def list_pictures(source: Path) -> list[tuple[Path, bool]]:
    """The picture files of a labelled folder or table, and whether each shows the concept.

    Args:
        source: A folder with the subfolders ``present`` and ``absent``, or a CSV file with the columns ``file``
            (beside it, or a whole path) and ``present`` (1 or 0).

    Raises:
        FileNotFoundError: There is nothing at ``source``, or a file of the table is not there.
        ValueError: There are no pictures, or a row is broken.
    """
    if source.is_dir():
        listed = [
            (file, present)
            for name, present in FOLDERS.items()
            for file in sorted((source / name).rglob("*"))
            if is_picture_file(file, source)
        ]
    elif source.is_file():
        listed = _list_table(source)
    else:
        raise FileNotFoundError(
            f"pictures is {source}, which is not there; name a folder with the subfolders {' and '.join(FOLDERS)}, or "
            "a CSV file with the columns file,present."
        )
    if not listed:
        raise ValueError(
            f"{source} names no pictures; they lie in its subfolders {' and '.join(FOLDERS)} (.png, .jpg, .webp, "
            ".tif, ...), or are the rows of a CSV file with the columns file,present."
        )
    return listed


def _list_table(table: Path) -> list[tuple[Path, bool]]:
    listed = []
    with csv_rows(table, ("file", "present")) as reader:
        for row in reader:
            word, file = (row["present"] or "").strip().lower(), table.parent / (row["file"] or "").strip()
            if word not in _WORDS:
                raise ValueError(f"{table}, line {reader.line_num}: present is {row['present']!r}; it must be 1 or 0.")
            if not file.is_file():
                raise FileNotFoundError(f"{table}, line {reader.line_num}: there is no file {file}.")
            listed.append((file, _WORDS[word]))
    return listed


def read_pictures(listed: Iterable[tuple[Path, bool]]) -> Iterator[Labelled]:
    """Read files one at a time.

    Raises:
        ValueError: A file is no picture.
    """
    for file, present in listed:
        yield read_picture_file(file), present


def check_drawable(concept: Concept) -> None:
    """See to it that the canvas can draw pictures with the concept and without.

    Raises:
        ValueError: It cannot.
    """
    drawable = {"style": STYLES, "object": SUBJECTS, "unsafe": ("fire",)}
    if concept.name not in drawable[concept.kind]:
        known = ", ".join(name for names in drawable.values() for name in names)
        raise ValueError(
            f"concept is {concept.name!r}, which the canvas does not draw; give labelled pictures with --pictures, or "
            f"one of {known}."
        )


def draw_pictures(concept: Concept, seed: int) -> Iterator[Labelled]:
    """Draw scenes of the canvas, with the concept and without by turns; picture ``i`` hangs on (seed, i) alone."""
    for index in count():
        generator = numpy_stream(seed, "labelled_pictures/scene", index)
        present = index % 2 == 0
        scene = random_scene(generator)
        while not present and _with_concept(scene, concept) == scene:
            scene = random_scene(generator)
        drawn = draw(_with_concept(scene, concept) if present else scene, generator)
        yield torch.from_numpy(drawn.copy()).permute(2, 0, 1).contiguous(), present


def _with_concept(scene: Scene, concept: Concept) -> Scene:
    match concept.kind:
        case "style":
            return replace(scene, style=concept.name)
        case "object":
            return replace(scene, subject=concept.name)
        case _:
            return replace(scene, burning=True)


def batched(pictures: Iterable[Labelled], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Put up to ``size`` neighbours of one shape together: pictures, uint8 [n, 3, H, W], and their truth, bool [n]."""
    for part in neighbours(pictures, size, lambda labelled: labelled[0]):
        yield torch.stack([image for image, _ in part]), torch.tensor([present for _, present in part])
