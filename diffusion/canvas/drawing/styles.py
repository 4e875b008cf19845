"""Styles: each turns the layers of a scene into one picture."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import ImageDraw
from scipy import ndimage

from diffusion.canvas.drawing.layers import Layers
from diffusion.canvas.drawing.pixels import (
    EDGE,
    LUMINANCE,
    SUPERSAMPLING,
    Floats,
    as_floats,
    as_image,
    blend,
    blurred,
    contrast,
    saturated,
    smooth_noise,
)


def _photo(layers: Layers, generator: np.random.Generator) -> Floats:
    """Style: smooth shading, a soft shadow and a slight gradient of light."""
    shadow = np.roll(blurred(layers.subject_mask, 5), (7, 6), axis=(0, 1))
    shadowed = layers.background * (1 - 0.4 * shadow[..., None])
    rows, columns = np.indices((EDGE, EDGE), dtype=np.float32) / np.float32(EDGE)
    # The blurred mask is highest in the middle of the subject, which makes flat fills look round.
    roundness = 0.72 + 0.36 * blurred(layers.subject_mask, 7)
    lit_subject = layers.subject * (roundness * (1.12 - 0.24 * rows))[..., None]
    picture = blend(blend(shadowed, lit_subject, layers.subject_mask), layers.flames, layers.flame_mask)
    slant = generator.uniform(-0.12, 0.12)
    light: Floats = (1.04 - 0.1 * rows + slant * (columns - 0.5))[..., None]
    return picture * light


def _van_gogh(layers: Layers, generator: np.random.Generator) -> Floats:
    """Style: thick curved strokes along a swirling flow, in a palette pushed towards yellow and blue."""
    scene = layers.without_flames()
    warmth = (scene[..., 0] - scene[..., 2])[..., None]
    light = (scene @ LUMINANCE)[..., None]
    blue, yellow = np.array([0.06, 0.2, 0.62], dtype=np.float32), np.array([1.0, 0.8, 0.2], dtype=np.float32)
    palette = blue + (yellow - blue) * np.clip(1.4 * light + 1.6 * warmth - 0.6, 0, 1)
    strength = 0.6 - 0.42 * layers.subject_mask
    painted = saturated(blend(scene, palette, strength), 1.35)
    painted = blend(painted, layers.flames, layers.flame_mask)

    per_edge = 16
    spacing = EDGE / per_edge
    grid = np.indices((per_edge, per_edge)).reshape(2, -1).T * spacing + spacing / 2
    positions = generator.permutation(grid + generator.uniform(-spacing / 2, spacing / 2, grid.shape))
    centres = generator.uniform(0, EDGE, (3, 2))
    spin = generator.choice([-1, 1], 3)
    offset = positions[:, None] - centres
    pull = spin * np.exp(-(offset**2).sum(axis=2) / (2 * 34**2))
    flow_x = (-pull * offset[..., 0]).sum(axis=1) + 6
    flow_y = (pull * offset[..., 1]).sum(axis=1) + 8 * np.sin(positions[:, 1] / 14)
    angle = np.arctan2(flow_y, flow_x)
    strokes = _brush_strokes(painted, positions, angle, generator)

    # Strokes as coarse as these would dissolve the subject and the flames, hence a thin repainting of both.
    strokes = blend(strokes, painted, 0.35 * np.maximum(layers.subject_mask, layers.flame_mask))
    return blend(strokes, blue * 0.3, layers.subject_lines() * (1 - layers.flame_mask) * 0.65)


def _brush_strokes(
    painted: Floats, positions: npt.NDArray[np.float64], angle: npt.NDArray[np.float64], generator: np.random.Generator
) -> Floats:
    """Paint bent strokes that take their colour from a picture, each with a light ridge as of thick paint."""
    image = as_image(painted * 0.8)
    pen = ImageDraw.Draw(image)
    rows, columns = positions.astype(int).clip(0, EDGE - 1).T
    brightness = generator.choice([0.62, 0.85, 1.1, 1.35], (len(positions), 1))
    colours = (painted[rows, columns] * brightness * 255).clip(0, 255).astype(int)
    ridges = (colours * 1.15 + 30).clip(0, 255).astype(int)
    along = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    across = np.stack([-along[:, 1], along[:, 0]], axis=1)
    middle = positions[:, ::-1]
    ends = middle - 9 * along + 4 * across, middle, middle + 9 * along + 4 * across
    strokes = np.concatenate(ends, axis=1)
    ridge_lines = strokes - np.tile(2 * across, 3)
    for stroke, ridge_line, colour, ridge in zip(
        strokes.tolist(), ridge_lines.tolist(), colours.tolist(), ridges.tolist(), strict=True
    ):
        pen.line(stroke, fill=tuple(colour), width=7)
        pen.line(ridge_line, fill=tuple(ridge), width=2)
    return as_floats(image)


def _pixel_art(layers: Layers, generator: np.random.Generator) -> Floats:
    """Style: blocks of 2x2 final pixels, few colour levels and a black outline around the subject."""
    block = 2 * SUPERSAMPLING
    dither = generator.uniform(-0.04, 0.04)
    blocks = as_floats(as_image(layers.without_flames()).reduce(block))
    covered = as_floats(as_image(layers.subject_mask).reduce(block)) > 0.45
    flames = layers.flames[block // 2 :: block, block // 2 :: block]
    burning = as_floats(as_image(layers.flame_mask).reduce(block)) > 0.5
    burning &= flames.any(axis=2)
    outline = ndimage.binary_dilation(covered) & ~covered
    levels = np.round(np.clip(saturated(blocks, 1.3) + dither, 0, 1) * 3) / 3
    levels[outline] = 0
    levels[burning] = np.round(flames[burning] * 3) / 3
    picture: Floats = levels.repeat(block, axis=0).repeat(block, axis=1)
    return picture


def _pencil_sketch(layers: Layers, generator: np.random.Generator) -> Floats:
    """Style: dark outlines and hatching in grey on white paper; only flames keep a warm tint."""
    tone = blend(layers.background * 0.4 + 0.6, layers.subject, layers.subject_mask) @ LUMINANCE
    rows, columns = np.indices((EDGE, EDGE), dtype=np.float32)
    wobble = 5 * smooth_noise(generator, 6)
    rising = np.sin((rows + columns + wobble) * (2 * np.pi / 12)) > 0.1
    falling = np.sin((rows - columns + wobble) * (2 * np.pi / 12)) > 0.2
    ink = np.where(rising & (tone < 0.8), 0.42 - 0.14 * layers.subject_mask, 0.0)
    ink = np.maximum(ink, np.where(falling & (tone < 0.42), 0.5 - 0.14 * layers.subject_mask, 0.0))
    ink = np.where(tone < 0.22, np.maximum(ink, 0.6), ink)
    ink = np.maximum(ink, layers.subject_lines() * 0.85) * (1 - layers.flame_mask)
    ink = np.maximum(ink, layers.flame_lines() * 0.8).astype(np.float32)
    paper = np.full((EDGE, EDGE, 3), 0.97, dtype=np.float32) - 0.05 * smooth_noise(generator, 32)[..., None]
    tinted = blend(paper, layers.flames * 0.85 + 0.15, layers.flame_mask * 0.85)
    return blend(tinted, 0.16, ink)


def _stained_glass(layers: Layers, generator: np.random.Generator) -> Floats:
    """Style: cells of saturated glass between black lead, with the subject cut out along its outline."""
    per_edge = 6
    spacing = EDGE / per_edge
    grid = np.indices((per_edge, per_edge)).reshape(2, -1) * spacing + spacing / 2
    seeds = (grid + generator.uniform(-spacing / 2.6, spacing / 2.6, grid.shape)).astype(np.float32)
    # Half the resolution is fine enough for lead and four times faster.
    axis = np.arange(0, EDGE, 2, dtype=np.float32)[:, None]
    distance = ((axis - seeds[0]) ** 2)[:, None] + ((axis - seeds[1]) ** 2)[None]
    cells = distance.argmin(axis=2).repeat(2, axis=0).repeat(2, axis=1)
    in_subject, in_flames = layers.subject_mask > 0.5, layers.flame_mask > 0.5
    region = np.where(in_flames, 2, in_subject)
    panes = cells * 3 + region

    picture = layers.flattened()
    pane_count = 3 * per_edge**2
    area = np.maximum(np.bincount(panes.ravel(), minlength=pane_count), 1)
    means = np.stack(
        [np.bincount(panes.ravel(), picture[..., channel].ravel(), pane_count) / area for channel in range(3)], axis=1
    )
    # Panes of the background vary more: they carry the style, while the subject keeps its drawing.
    tint = generator.uniform(0.7, 1.3, (per_edge**2, 1, 3)).repeat(3, axis=1)
    tint[:, 1:] = 1
    glass = (means * tint.reshape(-1, 3)).astype(np.float32)[panes]
    drawn = np.where(region > 0, 0.65, 0.05).astype(np.float32)
    coloured = saturated(blend(glass, picture, drawn), 2.0)

    cell_lead = contrast(cells) > 0
    cell_lead &= region == 0
    pane_lead = contrast(region) > 0
    thick = ndimage.binary_dilation(cell_lead | pane_lead)
    inner = layers.subject_lines() * (region == 1) * 0.6
    return blend(blend(coloured, 0.02, inner), 0.02, thick.astype(np.float32))


def _pointillism(layers: Layers, generator: np.random.Generator) -> Floats:
    """Style: separate dots of pure colour on a light ground."""
    picture = layers.flattened()
    ground = np.array([0.97, 0.95, 0.88], dtype=np.float32)
    underpainting = 0.15 + 0.4 * np.maximum(layers.subject_mask, layers.flame_mask)
    image = as_image(blend(np.broadcast_to(ground, picture.shape), picture, underpainting))
    pen = ImageDraw.Draw(image)
    spacing = 10.0
    rows, columns = np.mgrid[0 : EDGE + spacing : spacing, 0 : EDGE + spacing : spacing]
    columns[::2] += spacing / 2
    positions = np.stack([rows, columns], axis=-1).reshape(-1, 2)
    positions = positions + generator.uniform(-1, 1, positions.shape)
    row_index, column_index = positions.astype(int).clip(0, EDGE - 1).T
    sampled = saturated(picture, 1.7)[row_index, column_index]
    jitter = generator.normal(0, 0.12, sampled.shape) * (1 - layers.flame_mask[row_index, column_index, None])
    colours = ((sampled + jitter).clip(0, 1) * 255).astype(int)
    radii = generator.uniform(3.6, 4.4, len(positions))
    for (y, x), radius, colour in zip(positions.tolist(), radii.tolist(), colours.tolist(), strict=True):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(colour))
    contours = layers.subject_lines() * (1 - layers.flame_mask)
    return blend(as_floats(image), picture * 0.4, contours * 0.4)


def _watercolour(layers: Layers, generator: np.random.Generator) -> Floats:
    """Style: pale washes that bleed into each other and fade into the white of the paper."""
    drift_y, drift_x = (10 * (smooth_noise(generator, 10) - 0.5) for _ in range(2))
    rows, columns = np.mgrid[0:EDGE, 0:EDGE]
    source_rows = (rows + drift_y).astype(int).clip(0, EDGE - 1)
    source_columns = (columns + drift_x).astype(int).clip(0, EDGE - 1)
    washed = blurred(layers.flattened()[source_rows, source_columns], 2.2)
    # Pigment gathers where a wash dries, which darkens the rim of every shape a little.
    washed = blend(washed, washed * 0.4, 0.45 * layers.subject_lines()[source_rows, source_columns])
    kept = np.maximum(layers.subject_mask, layers.flame_mask)[source_rows, source_columns]

    pigment = 0.4 + 0.25 * smooth_noise(generator, 7) + 0.15 * kept
    border = np.minimum(np.minimum(rows, EDGE - 1 - rows), np.minimum(columns, EDGE - 1 - columns))
    ragged = border - 14 + 22 * (smooth_noise(generator, 8) - 0.5)
    wash = np.clip(ragged / 10, 0, 1).astype(np.float32)
    pigment = pigment * np.maximum(wash, 0.85 * blurred(kept, 2))
    paper = np.ones_like(washed)
    return blend(paper, saturated(washed, 1.25), pigment)


def _neon(layers: Layers, generator: np.random.Generator) -> Floats:
    """Style: glowing coloured outlines on a nearly black ground."""
    local = layers.subject / np.maximum(layers.subject.max(axis=2, keepdims=True), 0.25)
    tube = saturated(0.5 * local + 0.5 * layers.body / layers.body.max(), 1.5)
    lines = layers.subject_lines()
    spread_colour = blurred(blend(np.broadcast_to(layers.body, tube.shape), tube, layers.subject_mask), 2)
    hue = generator.uniform(0.6, 1.0, 3).astype(np.float32) * np.array([0.07, 0.04, 0.12], dtype=np.float32)
    dark = layers.background * 0.06 + hue
    lit = blend(dark, layers.subject * 0.16, layers.subject_mask)
    glow = blurred(spread_colour * lines[..., None], 5)
    lit = lit + 1.3 * glow
    lit = blend(lit, spread_colour * 0.85 + 0.15, lines)
    if not layers.flame_mask.any():
        return lit
    burning = blend(lit, layers.flames, layers.flame_mask * 0.9)
    return burning + blurred(layers.flames * layers.flame_mask[..., None], 6) * 0.35


STYLES: dict[str, Callable[[Layers, np.random.Generator], Floats]] = {
    "photo": _photo,
    "van_gogh": _van_gogh,
    "pixel_art": _pixel_art,
    "pencil_sketch": _pencil_sketch,
    "stained_glass": _stained_glass,
    "pointillism": _pointillism,
    "watercolour": _watercolour,
    "neon": _neon,
}
