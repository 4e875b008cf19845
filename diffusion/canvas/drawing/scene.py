"""Scenes laid out in layers and drawn."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from diffusion.canvas.drawing.flames import add_smoke_and_glow, draw_flames
from diffusion.canvas.drawing.layers import Layers
from diffusion.canvas.drawing.pixels import EDGE, SUPERSAMPLING, Rgb, as_floats, as_image, split_alpha
from diffusion.canvas.drawing.settings import BACKGROUNDS
from diffusion.canvas.drawing.styles import STYLES
from diffusion.canvas.drawing.subjects import SUBJECTS
from diffusion.canvas.world import COLOURS, SETTINGS, Scene

Value = TypeVar("Value")

_BODY_COLOURS: dict[str, Rgb] = {
    "red": (210, 38, 42),
    "blue": (40, 84, 210),
    "green": (34, 150, 62),
    "yellow": (242, 208, 44),
    "purple": (142, 58, 184),
    "orange": (242, 128, 28),
}


def draw(scene: Scene, generator: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Draw a scene.

    From equal generator states, scenes that differ in style alone share colours, setting and pose; a burning subject
    merely stands a little lower and smaller than the same one that does not burn.

    Args:
        scene: What to draw. A colour or setting of ``None`` is chosen at random.
        generator: Source of everything that the scene leaves open; it advances by the same amount for any scene.

    Returns:
        The RGB picture, [IMAGE_SIZE, IMAGE_SIZE, 3].

    Raises:
        ValueError: If a property of the scene is not among those that can be drawn.

    """
    apply_style = _look_up(STYLES, scene.style, "style")
    draw_subject = _look_up(SUBJECTS, scene.subject, "subject")
    if scene.count not in (1, 2):
        raise ValueError(f"unknown count {scene.count!r}, allowed: 1, 2")

    # Every concern has its own stream, so that a change of one property leaves the rest of the picture alone.
    seeds = generator.integers(2**63, size=4)
    choice, layout, fire, texture = (np.random.default_rng(seed) for seed in seeds)
    colour, setting = str(choice.choice(COLOURS)), str(choice.choice(SETTINGS))
    body = _look_up(_BODY_COLOURS, scene.colour or colour, "colour")
    paint_background = _look_up(BACKGROUNDS, scene.setting or setting, "setting")

    background = as_floats(paint_background(layout))
    subject_image = _place_subjects(draw_subject, body, scene, layout)
    subject, subject_mask = split_alpha(subject_image)
    flames, flame_mask = np.zeros_like(subject), np.zeros_like(subject_mask)
    if scene.burning:
        flames, flame_mask = split_alpha(draw_flames(subject_mask, fire))
        background = add_smoke_and_glow(background, flame_mask, fire)

    layers = Layers(background, subject, subject_mask, flames, flame_mask, np.array(body, dtype=np.float32) / 255)
    return np.asarray(as_image(apply_style(layers, texture)).reduce(SUPERSAMPLING))


def _look_up(table: Mapping[str, Value], name: str, kind: str) -> Value:
    if name not in table:
        raise ValueError(f"unknown {kind} {name!r}, allowed: {', '.join(table)}")
    return table[name]


def _place_subjects(
    draw_subject: Callable[[ImageDraw.ImageDraw, Rgb], None],
    body: Rgb,
    scene: Scene,
    generator: np.random.Generator,
) -> Image.Image:
    """Return the RGBA layer with one subject, or two side by side, each in a pose of its own."""
    upright = Image.new("RGBA", (EDGE, EDGE))
    draw_subject(ImageDraw.Draw(upright), body)
    layer = Image.new("RGBA", (EDGE, EDGE))
    centres = (0.5,) if scene.count == 1 else (0.26, 0.74)
    for centre in centres:
        if scene.count == 1:
            scale = generator.uniform(0.7, 0.84) * (0.9 if scene.burning else 1)
            shift = generator.uniform(-7, 7, 2)
        else:
            scale = generator.uniform(0.46, 0.53)
            shift = generator.uniform((-2, -8), (2, 8))
        # A burning subject stands lower, which leaves room for the flames above it.
        centre_x, centre_y = centre * EDGE + shift[0], EDGE / 2 + shift[1] + (13 if scene.burning else 4)
        angle = np.deg2rad(generator.uniform(-7, 7))
        mirror = generator.choice([-1, 1])
        # Pillow wants the map from a picture position back to the position in the upright drawing.
        cosine, sine = np.cos(angle) / scale, np.sin(angle) / scale
        half = EDGE / 2
        inverse = (
            mirror * cosine,
            mirror * sine,
            half - mirror * (cosine * centre_x + sine * centre_y),
            -sine,
            cosine,
            half - (cosine * centre_y - sine * centre_x),
        )
        layer.alpha_composite(upright.transform(layer.size, Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR))
    return layer
