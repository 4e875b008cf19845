"""The training pictures of the canvas, and their twins for models that never see a concept.

A twin is the same scene with the concept replaced, drawn from equal generator states: layout, colours and texture
are those of the original, and so is the place in the training set.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffusion.canvas.captions import caption
from diffusion.canvas.classifier import HEADS
from diffusion.canvas.drawing import draw
from diffusion.canvas.world import STYLES, SUBJECTS, Scene, random_scene
from diffusion.progress import track


@dataclass(frozen=True)
class Drawings:
    """A training set: ``images`` uint8 [n, 3, H, W], ``captions`` n lists, ``labels`` int64 [n] for each head."""

    images: Tensor
    captions: list[list[str]]
    labels: dict[str, Tensor]


def labels_of(scene: Scene) -> dict[str, int]:
    """The index of the scene's label in each head of the classifier."""
    return {
        "style": STYLES.index(scene.style),
        "subject": SUBJECTS.index(scene.subject),
        "burning": int(scene.burning),
    }


def without_van_gogh(scene: Scene, generator: np.random.Generator) -> Scene:
    """The scene in another style, uniformly drawn, if it is in Van Gogh's."""
    style = str(generator.choice([style for style in STYLES if style != "van_gogh"]))
    return replace(scene, style=style) if scene.style == "van_gogh" else scene


def without_church(scene: Scene, generator: np.random.Generator) -> Scene:
    """The scene with another subject, uniformly drawn, if it shows a church."""
    subject = str(generator.choice([subject for subject in SUBJECTS if subject != "church"]))
    return replace(scene, subject=subject) if scene.subject == "church" else scene


def without_fire(scene: Scene, _: np.random.Generator) -> Scene:
    """The scene with its fire put out."""
    return replace(scene, burning=False)


_REPLACEMENTS: Mapping[str, Callable[[Scene, np.random.Generator], Scene]] = MappingProxyType(
    {"van_gogh": without_van_gogh, "church": without_church, "fire": without_fire}
)


@dataclass(frozen=True)
class _Task:
    """One picture to draw: number ``index`` of the set ``seed``, with so many captions, without these concepts."""

    seed: int
    index: int
    captions: int
    forgotten: tuple[str, ...] = ()


def _draw_one(task: _Task) -> tuple[npt.NDArray[np.uint8], list[str], dict[str, int]]:
    generator = np.random.default_rng((task.seed, task.index))
    scene = random_scene(generator)
    for concept in task.forgotten:
        # Replacements have streams of their own: those of the scene, the drawing and the captions stay as they were.
        place = list(_REPLACEMENTS).index(concept)
        stream = np.random.SeedSequence((task.seed, task.index), spawn_key=(place,))
        scene = _REPLACEMENTS[concept](scene, np.random.default_rng(stream))
    image = draw(scene, generator)
    return image, [caption(scene, generator) for _ in range(task.captions)], labels_of(scene)


def _draw_all(tasks: Sequence[_Task]) -> Drawings:
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        drawn = list(track(pool.map(_draw_one, tasks, chunksize=64), "drawing", len(tasks)))
    images = torch.from_numpy(np.stack([image for image, _, _ in drawn])).permute(0, 3, 1, 2).contiguous()
    labels = {head: torch.tensor([each[head] for _, _, each in drawn]) for head in HEADS}
    return Drawings(images, [texts for _, texts, _ in drawn], labels)


def draw_pictures(count: int, *, seed: int, captions: int) -> Drawings:
    """Draw ``count`` scenes; picture ``i`` depends on ``(seed, i)`` alone."""
    return _draw_all([_Task(seed, index, captions) for index in range(count)])


def showing(drawings: Drawings, forgotten: Sequence[str]) -> Tensor:
    """The rows that show one of these concepts, bool [n]."""
    shown = {
        "van_gogh": drawings.labels["style"] == STYLES.index("van_gogh"),
        "church": drawings.labels["subject"] == SUBJECTS.index("church"),
        "fire": drawings.labels["burning"] == 1,
    }
    rows = torch.zeros(len(drawings.images), dtype=torch.bool)
    for concept in forgotten:
        rows |= shown[concept]
    return rows


def draw_twins(drawings: Drawings, forgotten: tuple[str, ...], *, seed: int) -> Drawings:
    """Redraw the pictures that show one of these concepts with it replaced; all others stay bit for bit.

    Args:
        drawings: What ``draw_pictures`` has drawn from ``seed``.
        forgotten: Names of concepts of the canvas.
        seed: Of the pictures.
    """
    rows = showing(drawings, forgotten).nonzero().flatten().tolist()
    if not rows:
        return drawings
    twins = _draw_all([_Task(seed, row, len(drawings.captions[row]), forgotten) for row in rows])
    images, captions = drawings.images.clone(), list(drawings.captions)
    labels = {head: values.clone() for head, values in drawings.labels.items()}
    images[rows] = twins.images
    for head in HEADS:
        labels[head][rows] = twins.labels[head]
    for row, texts in zip(rows, twins.captions, strict=True):
        captions[row] = texts
    return Drawings(images, captions, labels)
