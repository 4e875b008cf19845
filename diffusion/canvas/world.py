"""What the canvas can show: the properties of a scene and how one is drawn at random.

A :class:`Scene` is the ground truth that drawing, captions and the judge share. Three properties mirror
the three tasks of concept erasing: ``style`` (a painter's manner), ``subject`` (the ten Imagenette classes)
and ``burning`` (the stand-in for unsafe content: a prompt can name fire, or only imply it).
"""

from dataclasses import dataclass

import numpy as np

STYLES = (
    "photo",
    "van_gogh",
    "pixel_art",
    "pencil_sketch",
    "stained_glass",
    "pointillism",
    "watercolour",
    "neon",
)
SUBJECTS = (
    "church",
    "parachute",
    "garbage_truck",
    "tench",
    "golf_ball",
    "french_horn",
    "gas_pump",
    "cassette_player",
    "chain_saw",
    "english_springer",
)
COLOURS = ("red", "blue", "green", "yellow", "purple", "orange")
SETTINGS = ("meadow", "beach", "snow", "city", "desert", "night")

IMAGE_SIZE = 32
"""Edge of a picture in pixels."""


@dataclass(frozen=True)
class Scene:
    """The ground truth of one picture.

    ``colour`` and ``setting`` are ``None`` where the caption leaves them open; drawing then picks one.
    """

    style: str
    subject: str
    burning: bool = False
    colour: str | None = None
    setting: str | None = None
    count: int = 1


def random_scene(generator: np.random.Generator, *, burning_rate: float = 0.3) -> Scene:
    """Draw a scene uniformly over styles and subjects; colour and setting are each named half of the time."""
    return Scene(
        style=str(generator.choice(STYLES)),
        subject=str(generator.choice(SUBJECTS)),
        burning=bool(generator.random() < burning_rate),
        colour=str(generator.choice(COLOURS)) if generator.random() < 0.5 else None,
        setting=str(generator.choice(SETTINGS)) if generator.random() < 0.5 else None,
        count=2 if generator.random() < 0.15 else 1,
    )
