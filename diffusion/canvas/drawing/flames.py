"""Fire on subjects, with its smoke and glow."""

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from diffusion.canvas.drawing.pixels import EDGE, Floats, Rgb, as_floats, blend, blurred

_FLAME_RED: Rgb = (226, 36, 12)
_FLAME_ORANGE: Rgb = (255, 138, 0)
_FLAME_YELLOW: Rgb = (255, 236, 70)

_FLAME_COVERAGE = 0.18
"""Fraction of the picture at which no more flames are added."""


def _flame_tongues(
    roots: npt.NDArray[np.float64], size: npt.NDArray[np.float64], sway: npt.NDArray[np.float64]
) -> list[list[float]]:
    """Return one polygon per tongue: round at the root, bent sideways and pointed at the tip.

    Args:
        roots: Middle of the base of each tongue, x and y, [tongues, 2].
        size: Half the width and the height of each tongue, [tongues, 2].
        sway: How far each tongue bends to the right, [tongues].

    Returns:
        The corners of each polygon as x, y, x, y, ...

    """
    fraction = np.linspace(-0.22, 1, 9)
    rounding = np.sqrt(np.clip(1 - (fraction / 0.22) ** 2, 0, 1))
    width = size[:, :1] * np.where(fraction < 0, rounding, (1 - fraction) ** 0.85)
    middle = roots[:, :1] + sway[:, None] * np.sin(2.6 * np.clip(fraction, 0, 1))
    height = roots[:, 1:] - size[:, 1:] * fraction
    left, right = np.stack([middle - width, height], axis=2), np.stack([middle + width, height], axis=2)
    corners = np.concatenate([left, right[:, ::-1]], axis=1)
    polygons: list[list[float]] = corners.reshape(len(roots), -1).tolist()
    return polygons


def _flame_roots(solid: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Return where flames may start, along the top and both sides of the subject: x and y, [roots, 2]."""
    columns = np.flatnonzero(solid.any(axis=0))
    top_of_column = solid.argmax(axis=0)
    left, right = int(columns[0]), int(columns[-1])
    bottom = int(np.flatnonzero(solid.any(axis=1))[-1])
    count = max(5, round((right - left) / 13))
    along_top = columns[np.linspace(2, len(columns) - 3, count).astype(int)]
    roots = [(x, top_of_column[x]) for x in along_top.tolist()]
    middle = (int(top_of_column[columns].min()) + bottom) / 2
    roots += [(left - 1, middle), (right + 1, middle), (left - 2, bottom - 6), (right + 2, bottom - 6)]
    return np.array(roots, dtype=np.float64)


def draw_flames(subject_mask: Floats, generator: np.random.Generator) -> Image.Image:
    """Return the RGBA layer with flames that rise from the top and the sides of the subject."""
    solid = subject_mask > 0.5
    roots = _flame_roots(solid)
    minimum = len(roots)
    roots = np.tile(roots, (4, 1))
    roots += generator.uniform((-5, 4), (5, 12), roots.shape)
    roots = roots.clip((4, 34), (EDGE - 4, EDGE))
    size = generator.uniform((7.5, 27), (10.5, 40), roots.shape)
    sway = generator.uniform(-8, 8, len(roots))
    outer, orange, core = (_flame_tongues(roots, size * part, sway * part) for part in (1.0, 0.74, 0.42))

    # Most flames rise behind the subject, which would otherwise disappear; every third one licks over it.
    behind, before = Image.new("L", (EDGE, EDGE)), Image.new("L", (EDGE, EDGE))
    used = len(outer)
    for index, polygon in enumerate(outer):
        # Every root burns; later rounds only fill up what small or slender subjects leave open.
        if index >= minimum:
            visible = np.where(solid, 0, np.asarray(behind)) | np.asarray(before)
            if np.count_nonzero(visible) > _FLAME_COVERAGE * EDGE**2:
                used = index
                break
        ImageDraw.Draw(before if index % 3 == 0 else behind).polygon(polygon, fill=255)

    layer = Image.new("RGBA", (EDGE, EDGE))
    pen = ImageDraw.Draw(layer)
    for is_before in (False, True):
        # Colour by colour rather than tongue by tongue, so that neighbouring tongues merge into one fire.
        for polygons, colour in ((outer, _FLAME_RED), (orange, _FLAME_ORANGE), (core, _FLAME_YELLOW)):
            for index in range(used):
                if (index % 3 == 0) == is_before:
                    pen.polygon(polygons[index], fill=colour)
        if not is_before:
            layer.paste((0, 0, 0, 0), mask=Image.fromarray(solid.astype(np.uint8) * 255))
    return layer


def add_smoke_and_glow(background: Floats, flame_mask: Floats, generator: np.random.Generator) -> Floats:
    """A background behind a burning subject."""
    smoke_image = Image.new("L", (EDGE, EDGE))
    pen = ImageDraw.Draw(smoke_image)
    middle = float(generator.uniform(40, 88))
    for step in range(4):
        x, y, radius = middle + generator.uniform(-14, 14), 30 - 10 * step, 9 + 3 * step
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=150)
    smoke = blurred(as_floats(smoke_image), 5)
    glow = blurred(flame_mask, 7)
    smoky = blend(background, 0.3, smoke)
    return blend(smoky, np.array([1.0, 0.55, 0.1], dtype=np.float32), glow * 0.6)
