"""Drawing of scenes: from the properties of a :class:`~diffusion.canvas.world.Scene` to a small RGB picture.

A scene is first laid out as separate layers (background, subject, flames) at four times the final resolution.
A style then turns the layers into one picture, so that it can treat them apart: an outline follows the subject,
and flames keep their warm colours whatever the style does to the rest. Averaging 4x4 blocks gives the final size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

from diffusion.canvas.world import COLOURS, IMAGE_SIZE, SETTINGS, Scene

Floats = npt.NDArray[np.floating[Any]]
Rgb = tuple[int, int, int]
Value = TypeVar("Value")

_SUPERSAMPLING = 4
_EDGE = IMAGE_SIZE * _SUPERSAMPLING
"""Edge of the layers in pixels. All coordinates below are in these pixels, with y pointing down."""

_BODY_COLOURS: dict[str, Rgb] = {
    "red": (210, 38, 42),
    "blue": (40, 84, 210),
    "green": (34, 150, 62),
    "yellow": (242, 208, 44),
    "purple": (142, 58, 184),
    "orange": (242, 128, 28),
}
_WHITE: Rgb = (244, 244, 240)
_LIGHT_GREY: Rgb = (196, 200, 206)
_GREY: Rgb = (124, 128, 136)
_DARK: Rgb = (38, 38, 46)
_GLASS: Rgb = (182, 218, 238)

_FLAME_RED: Rgb = (226, 36, 12)
_FLAME_ORANGE: Rgb = (255, 138, 0)
_FLAME_YELLOW: Rgb = (255, 236, 70)
_FLAME_COVERAGE = 0.18
"""Fraction of the picture at which no more flames are added."""

_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@dataclass(frozen=True)
class _Layers:
    """The parts of a scene before styling; colours [edge, edge, 3] and masks [edge, edge], all within 0 and 1."""

    background: Floats
    subject: Floats
    subject_mask: Floats
    flames: Floats
    flame_mask: Floats
    body: Floats

    def without_flames(self) -> Floats:
        """Return the subject on the background, [edge, edge, 3]."""
        return _blend(self.background, self.subject, self.subject_mask)

    def flattened(self) -> Floats:
        """Return all layers on top of each other, [edge, edge, 3]."""
        return _blend(self.without_flames(), self.flames, self.flame_mask)

    def subject_lines(self) -> Floats:
        """Return the outline and the inner contours of the subject as line opacity, [edge, edge]."""
        painted = (self.subject[..., channel] * self.subject_mask for channel in range(3))
        lines: Floats = np.clip((_contrast(*painted, self.subject_mask) - 0.15) * 4, 0, 1)
        return lines

    def flame_lines(self) -> Floats:
        """Return the outline of the flames as line opacity, [edge, edge]."""
        lines: Floats = np.clip(_contrast(self.flame_mask) * 2, 0, 1)
        return lines


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
    apply_style = _look_up(_STYLES, scene.style, "style")
    draw_subject = _look_up(_SUBJECTS, scene.subject, "subject")
    if scene.count not in (1, 2):
        raise ValueError(f"unknown count {scene.count!r}, allowed: 1, 2")

    # Every concern has its own stream, so that a change of one property leaves the rest of the picture alone.
    seeds = generator.integers(2**63, size=4)
    choice, layout, fire, texture = (np.random.default_rng(seed) for seed in seeds)
    colour, setting = str(choice.choice(COLOURS)), str(choice.choice(SETTINGS))
    body = _look_up(_BODY_COLOURS, scene.colour or colour, "colour")
    paint_background = _look_up(_BACKGROUNDS, scene.setting or setting, "setting")

    background = _as_floats(paint_background(layout))
    subject_image = _place_subjects(draw_subject, body, scene, layout)
    subject, subject_mask = _split_alpha(subject_image)
    flames, flame_mask = np.zeros_like(subject), np.zeros_like(subject_mask)
    if scene.burning:
        flames, flame_mask = _split_alpha(_draw_flames(subject_mask, fire))
        background = _add_smoke_and_glow(background, flame_mask, fire)

    layers = _Layers(background, subject, subject_mask, flames, flame_mask, np.array(body, dtype=np.float32) / 255)
    return np.asarray(_as_image(apply_style(layers, texture)).reduce(_SUPERSAMPLING))


def _look_up(table: Mapping[str, Value], name: str, kind: str) -> Value:
    if name not in table:
        raise ValueError(f"unknown {kind} {name!r}, allowed: {', '.join(table)}")
    return table[name]


def _as_floats(image: Image.Image) -> Floats:
    pixels: Floats = np.multiply(np.asarray(image), np.float32(1 / 255))
    return pixels


def _as_image(pixels: Floats) -> Image.Image:
    scaled = pixels * 255
    scaled += 0.5
    return Image.fromarray(np.clip(scaled, 0, 255, out=scaled).astype(np.uint8))


def _split_alpha(image: Image.Image) -> tuple[Floats, Floats]:
    return _as_floats(image.convert("RGB")), _as_floats(image.getchannel("A"))


def _blend(below: Floats, above: Floats | float, opacity: Floats) -> Floats:
    # In place, because temporaries of this size cost more than the arithmetic.
    blended: Floats = np.subtract(above, below)
    for channel in range(blended.shape[2]):
        blended[..., channel] *= opacity
    blended += below
    return blended


def _blurred(pixels: Floats, radius: float) -> Floats:
    """Blur a picture or a mask; the kernel is a box, or close to a Gaussian where it is wide enough to matter."""
    image = _as_image(pixels)
    if radius < 4:
        return _as_floats(image.filter(ImageFilter.BoxBlur(radius)))
    # A wide blur leaves nothing that a quarter of the resolution could not hold, and there it is far cheaper.
    small = image.reduce(4).filter(ImageFilter.GaussianBlur(radius / 4))
    return _as_floats(small.resize(image.size, Image.Resampling.BILINEAR))


def _saturated(pixels: Floats, amount: float) -> Floats:
    grey = (pixels @ _LUMINANCE)[..., None]
    return np.clip(grey + (pixels - grey) * amount, 0, 1)


def _contrast(*planes: npt.NDArray[Any]) -> Floats:
    """Return the largest change of any plane, each [edge, edge], across three pixels, [edge, edge]."""
    strongest = np.zeros((_EDGE, _EDGE), dtype=np.float32)
    for plane in planes:
        padded = np.pad(plane.astype(np.float32), (2, 1), mode="edge")
        np.maximum(strongest, np.abs(padded[2:-1, 3:] - padded[2:-1, :-3]), out=strongest)
        np.maximum(strongest, np.abs(padded[3:, 2:-1] - padded[:-3, 2:-1]), out=strongest)
    return strongest


def _smooth_noise(generator: np.random.Generator, cells: int) -> Floats:
    """Return smooth random values within 0 and 1 that vary over ``cells`` cells per edge, [edge, edge]."""
    coarse = Image.fromarray(generator.integers(0, 256, (cells, cells), dtype=np.uint8))
    return _as_floats(coarse.resize((_EDGE, _EDGE), Image.Resampling.BICUBIC))


def _scaled(colour: Rgb, factor: float) -> Rgb:
    """Return a darker (factor below 1) or lighter shade of a colour."""
    red, green, blue = (min(255, round(channel * factor)) for channel in colour)
    return red, green, blue


def _gradient(top: Rgb, bottom: Rgb) -> Image.Image:
    """Return a picture that fades from one colour at the top to another at the bottom."""
    fraction = np.linspace(0, 1, _EDGE)[:, None, None]
    rows = (1 - fraction) * np.array(top) + fraction * np.array(bottom)
    return Image.fromarray(np.broadcast_to(rows, (_EDGE, _EDGE, 3)).astype(np.uint8))


def _meadow(generator: np.random.Generator) -> Image.Image:
    image = _gradient((110, 176, 236), (214, 234, 246))
    pen = ImageDraw.Draw(image)
    horizon = int(generator.integers(64, 84))
    hill = int(generator.integers(0, _EDGE))
    pen.ellipse((hill - 80, horizon - 14, hill + 80, horizon + 60), fill=(92, 160, 84))
    pen.rectangle((0, horizon, _EDGE, _EDGE), fill=(112, 186, 76))
    for x, y in generator.integers((0, horizon + 4), (_EDGE, _EDGE), (14, 2)).tolist():
        pen.ellipse((x, y, x + 4, y + 4), fill=(236, 244, 220))
    return image


def _beach(generator: np.random.Generator) -> Image.Image:
    image = _gradient((150, 210, 242), (222, 240, 246))
    pen = ImageDraw.Draw(image)
    horizon = int(generator.integers(52, 66))
    shore = horizon + int(generator.integers(18, 28))
    pen.rectangle((0, horizon, _EDGE, shore), fill=(30, 130, 176))
    pen.rectangle((0, shore, _EDGE, _EDGE), fill=(236, 216, 164))
    pen.line([(x, shore + 3 * (x // 16 % 2)) for x in range(0, _EDGE + 16, 16)], fill=_WHITE, width=5)
    return image


def _snow(generator: np.random.Generator) -> Image.Image:
    image = _gradient((172, 186, 204), (214, 222, 232))
    pen = ImageDraw.Draw(image)
    horizon = int(generator.integers(66, 84))
    for x in generator.integers(0, _EDGE, 4).tolist():
        pen.polygon([(x - 10, horizon + 2), (x, horizon - 28), (x + 10, horizon + 2)], fill=(70, 96, 96))
    pen.rectangle((0, horizon, _EDGE, _EDGE), fill=(240, 244, 250))
    for x, y in generator.integers(0, _EDGE, (24, 2)).tolist():
        pen.ellipse((x, y, x + 4, y + 4), fill=(252, 252, 255))
    return image


def _city(generator: np.random.Generator) -> Image.Image:
    image = _gradient((176, 190, 204), (212, 216, 220))
    pen = ImageDraw.Draw(image)
    street = int(generator.integers(88, 102))
    for left in range(-6, _EDGE, 22):
        roof = int(generator.integers(10, 62))
        wall = _scaled((128, 126, 134), float(generator.uniform(0.75, 1.2)))
        pen.rectangle((left, roof, left + 20, street), fill=wall)
        for window_top in range(roof + 6, street - 6, 12):
            pen.rectangle((left + 4, window_top, left + 8, window_top + 5), fill=_scaled(wall, 0.65))
            pen.rectangle((left + 12, window_top, left + 16, window_top + 5), fill=_scaled(wall, 0.65))
    pen.rectangle((0, street, _EDGE, _EDGE), fill=(92, 92, 98))
    for left in range(int(generator.integers(-12, 12)), _EDGE, 36):
        pen.rectangle((left, street + 12, left + 18, street + 15), fill=(220, 220, 216))
    return image


def _desert(generator: np.random.Generator) -> Image.Image:
    image = _gradient((142, 190, 214), (238, 226, 196))
    pen = ImageDraw.Draw(image)
    horizon = int(generator.integers(62, 78))
    dune = int(generator.integers(0, _EDGE))
    pen.rectangle((0, horizon, _EDGE, _EDGE), fill=(208, 164, 106))
    pen.ellipse((dune - 70, horizon - 12, dune + 70, horizon + 50), fill=(190, 144, 90))
    pen.ellipse((dune - 150, horizon + 8, dune + 10, horizon + 90), fill=(220, 180, 122))
    stem, green = int(generator.choice([10, 112])), (64, 112, 70)
    pen.line([(stem, horizon + 10), (stem, horizon - 26)], fill=green, width=6)
    pen.line([(stem, horizon - 6), (stem + 9, horizon - 6), (stem + 9, horizon - 16)], fill=green, width=4)
    return image


def _night(generator: np.random.Generator) -> Image.Image:
    image = _gradient((14, 18, 52), (44, 52, 104))
    pen = ImageDraw.Draw(image)
    horizon = int(generator.integers(80, 98))
    for x, y in generator.integers((0, 0), (_EDGE, horizon), (16, 2)).tolist():
        pen.ellipse((x, y, x + 3, y + 3), fill=(226, 230, 246))
    moon = int(generator.choice([8, 98]))
    pen.ellipse((moon, 8, moon + 22, 30), fill=(232, 236, 240))
    pen.rectangle((0, horizon, _EDGE, _EDGE), fill=(24, 34, 44))
    return image


_BACKGROUNDS: dict[str, Callable[[np.random.Generator], Image.Image]] = {
    "meadow": _meadow,
    "beach": _beach,
    "snow": _snow,
    "city": _city,
    "desert": _desert,
    "night": _night,
}


def _church(pen: ImageDraw.ImageDraw, body: Rgb) -> None:
    slate = (72, 76, 92)
    pen.rectangle((50, 72, 120, 126), fill=body)
    pen.polygon([(46, 74), (60, 46), (112, 46), (126, 74)], fill=slate)
    pen.rectangle((14, 50, 54, 126), fill=_scaled(body, 0.88))
    pen.polygon([(8, 52), (34, 14), (60, 52)], fill=slate)
    pen.line([(34, 0), (34, 18)], fill=_DARK, width=6)
    pen.line([(26, 7), (42, 7)], fill=_DARK, width=5)
    pen.pieslice((24, 88, 44, 116), 180, 360, fill=_DARK)
    pen.rectangle((24, 102, 44, 126), fill=_DARK)
    pen.ellipse((26, 60, 42, 76), fill=_GLASS)
    for left in (64, 84, 104):
        pen.pieslice((left, 82, left + 10, 98), 180, 360, fill=_GLASS)
        pen.rectangle((left, 90, left + 10, 110), fill=_GLASS)


def _parachute(pen: ImageDraw.ImageDraw, body: Rgb) -> None:
    for rim in (5, 30, 50, 78, 98, 123):
        pen.line([(rim, 48), (64, 100)], fill=_DARK, width=3)
    pen.pieslice((2, 2, 126, 100), 180, 360, fill=body)
    pen.pieslice((24, 2, 104, 100), 180, 360, fill=_WHITE)
    pen.pieslice((46, 2, 82, 100), 180, 360, fill=body)
    pen.ellipse((57, 88, 71, 102), fill=(232, 190, 156))
    pen.rectangle((56, 101, 72, 116), fill=_DARK)
    pen.line([(59, 114), (56, 126)], fill=_DARK, width=6)
    pen.line([(69, 114), (72, 126)], fill=_DARK, width=6)


def _garbage_truck(pen: ImageDraw.ImageDraw, body: Rgb) -> None:
    pen.polygon([(2, 52), (14, 24), (82, 24), (88, 34), (88, 96), (8, 96)], fill=body)
    pen.polygon([(2, 52), (14, 24), (24, 24), (24, 96), (8, 96)], fill=_scaled(body, 0.6))
    for left in (42, 62):
        pen.rectangle((left, 30, left + 4, 88), fill=_scaled(body, 0.65))
    pen.polygon([(91, 46), (112, 46), (125, 70), (125, 96), (91, 96)], fill=_WHITE)
    pen.polygon([(98, 52), (110, 52), (119, 70), (98, 70)], fill=(96, 150, 186))
    pen.rectangle((6, 94, 126, 101), fill=_DARK)
    for centre in (30, 60, 107):
        pen.ellipse((centre - 14, 88, centre + 14, 116), fill=_DARK)
        pen.ellipse((centre - 6, 96, centre + 6, 108), fill=_LIGHT_GREY)


def _tench(pen: ImageDraw.ImageDraw, body: Rgb) -> None:
    fin = _scaled(body, 0.68)
    pen.polygon([(92, 64), (126, 32), (117, 64), (126, 96)], fill=fin)
    pen.polygon([(40, 42), (58, 20), (82, 44)], fill=fin)
    pen.polygon([(46, 86), (62, 106), (76, 82)], fill=fin)
    pen.ellipse((2, 34, 106, 94), fill=body)
    pen.chord((8, 38, 100, 92), 25, 155, fill=_scaled(_WHITE, 0.95))
    for left, top in ((46, 44), (62, 48), (78, 52), (54, 58), (70, 62)):
        pen.arc((left - 7, top, left + 7, top + 16), 280, 440, fill=fin, width=3)
    pen.arc((10, 38, 40, 90), 290, 430, fill=fin, width=4)
    pen.ellipse((14, 48, 28, 62), fill=_WHITE)
    pen.ellipse((17, 51, 25, 59), fill=_DARK)
    pen.line([(3, 70), (16, 74)], fill=_DARK, width=4)


def _golf_ball(pen: ImageDraw.ImageDraw, body: Rgb) -> None:
    pen.polygon([(38, 94), (90, 94), (74, 108), (70, 127), (58, 127), (54, 108)], fill=_LIGHT_GREY)
    pen.ellipse((14, 0, 114, 100), fill=body)
    dimple = _scaled(body, 0.62)
    for row, y in enumerate(range(14, 100, 18)):
        for x in range(24 + 10 * (row % 2), 112, 20):
            if (x - 64) ** 2 + (y - 50) ** 2 < 42**2:
                pen.ellipse((x - 5, y - 5, x + 5, y + 5), fill=dimple)
    pen.ellipse((34, 14, 54, 30), fill=_WHITE)


def _french_horn(pen: ImageDraw.ImageDraw, body: Rgb) -> None:
    tube = _scaled(body, 0.72)
    pen.line([(4, 4), (34, 40)], fill=tube, width=8)
    pen.ellipse((0, 0, 12, 12), fill=_LIGHT_GREY)
    pen.ellipse((12, 18, 98, 104), outline=body, width=14)
    pen.ellipse((34, 40, 76, 82), outline=tube, width=8)
    for left in (38, 51, 64):
        pen.rectangle((left, 28, left + 8, 62), fill=_LIGHT_GREY)
    pen.polygon([(58, 90), (84, 66), (126, 78), (78, 127)], fill=body)
    pen.polygon([(126, 74), (128, 96), (98, 127), (74, 127)], fill=_DARK)


def _gas_pump(pen: ImageDraw.ImageDraw, body: Rgb) -> None:
    pen.line([(80, 34), (104, 34), (112, 50), (112, 98), (104, 106), (96, 98), (96, 70)], fill=_DARK, width=7)
    pen.polygon([(100, 24), (118, 24), (122, 50), (104, 50)], fill=_GREY)
    pen.rounded_rectangle((18, 2, 84, 120), 10, fill=body)
    pen.rectangle((12, 114, 90, 127), fill=_DARK)
    pen.rectangle((28, 14, 74, 46), fill=_WHITE)
    pen.rectangle((34, 20, 68, 26), fill=_DARK)
    pen.rectangle((34, 33, 58, 39), fill=_DARK)
    pen.rectangle((28, 58, 74, 66), fill=_scaled(body, 0.6))
    pen.ellipse((40, 76, 62, 98), fill=_WHITE)


def _cassette_player(pen: ImageDraw.ImageDraw, body: Rgb) -> None:
    pen.rounded_rectangle((22, 14, 106, 60), 8, outline=_DARK, width=7)
    pen.rounded_rectangle((1, 34, 127, 112), 8, fill=body)
    for centre in (24, 104):
        pen.ellipse((centre - 19, 60, centre + 19, 98), fill=_DARK)
        pen.ellipse((centre - 8, 71, centre + 8, 87), fill=_GREY)
    pen.rectangle((46, 62, 82, 100), fill=_WHITE)
    for centre in (56, 72):
        pen.ellipse((centre - 6, 72, centre + 6, 84), fill=_DARK)
    pen.rectangle((50, 90, 78, 95), fill=_GREY)
    for left in range(12, 112, 18):
        pen.rectangle((left, 42, left + 10, 52), fill=_LIGHT_GREY)


def _chain_saw(pen: ImageDraw.ImageDraw, body: Rgb) -> None:
    for left in range(4, 66, 12):
        pen.polygon([(left, 62), (left + 4, 52), (left + 8, 62)], fill=_DARK)
        pen.polygon([(left, 88), (left + 4, 98), (left + 8, 88)], fill=_DARK)
    pen.rounded_rectangle((0, 60, 80, 90), 14, fill=_DARK)
    pen.rounded_rectangle((6, 66, 80, 84), 8, fill=_LIGHT_GREY)
    pen.arc((56, 22, 104, 90), 180, 360, fill=_DARK, width=8)
    pen.rounded_rectangle((98, 56, 127, 96), 10, outline=_DARK, width=8)
    pen.polygon([(60, 54), (72, 44), (104, 44), (112, 58), (112, 100), (66, 104)], fill=body)
    pen.ellipse((74, 62, 100, 88), fill=_scaled(body, 0.6))
    pen.ellipse((81, 69, 93, 81), fill=_WHITE)


def _english_springer(pen: ImageDraw.ImageDraw, body: Rgb) -> None:
    coat = (240, 236, 228)
    shadow = (190, 184, 176)
    pen.line([(20, 58), (2, 38)], fill=body, width=9)
    for left, fill in ((26, shadow), (84, shadow), (14, coat), (72, coat)):
        pen.rectangle((left, 78, left + 12, 124), fill=fill)
    pen.rounded_rectangle((10, 48, 98, 94), 20, fill=coat)
    pen.chord((10, 48, 56, 96), 150, 400, fill=body)
    pen.ellipse((54, 46, 84, 78), fill=body)
    pen.polygon([(76, 54), (88, 20), (112, 28), (98, 84), (82, 88)], fill=coat)
    pen.ellipse((82, 6, 116, 42), fill=body)
    pen.rounded_rectangle((100, 24, 127, 42), 7, fill=coat)
    pen.ellipse((119, 22, 128, 31), fill=_DARK)
    pen.ellipse((103, 15, 110, 22), fill=_DARK)
    pen.ellipse((78, 14, 96, 58), fill=_scaled(body, 0.62))


_SUBJECTS: dict[str, Callable[[ImageDraw.ImageDraw, Rgb], None]] = {
    "church": _church,
    "parachute": _parachute,
    "garbage_truck": _garbage_truck,
    "tench": _tench,
    "golf_ball": _golf_ball,
    "french_horn": _french_horn,
    "gas_pump": _gas_pump,
    "cassette_player": _cassette_player,
    "chain_saw": _chain_saw,
    "english_springer": _english_springer,
}


def _place_subjects(
    draw_subject: Callable[[ImageDraw.ImageDraw, Rgb], None],
    body: Rgb,
    scene: Scene,
    generator: np.random.Generator,
) -> Image.Image:
    """Return the RGBA layer with one subject, or two side by side, each in a pose of its own."""
    upright = Image.new("RGBA", (_EDGE, _EDGE))
    draw_subject(ImageDraw.Draw(upright), body)
    layer = Image.new("RGBA", (_EDGE, _EDGE))
    centres = (0.5,) if scene.count == 1 else (0.26, 0.74)
    for centre in centres:
        if scene.count == 1:
            scale = generator.uniform(0.7, 0.84) * (0.9 if scene.burning else 1)
            shift = generator.uniform(-7, 7, 2)
        else:
            scale = generator.uniform(0.46, 0.53)
            shift = generator.uniform((-2, -8), (2, 8))
        # A burning subject stands lower, which leaves room for the flames above it.
        centre_x, centre_y = centre * _EDGE + shift[0], _EDGE / 2 + shift[1] + (13 if scene.burning else 4)
        angle = np.deg2rad(generator.uniform(-7, 7))
        mirror = generator.choice([-1, 1])
        # Pillow wants the map from a picture position back to the position in the upright drawing.
        cosine, sine = np.cos(angle) / scale, np.sin(angle) / scale
        half = _EDGE / 2
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


def _draw_flames(subject_mask: Floats, generator: np.random.Generator) -> Image.Image:
    """Return the RGBA layer with flames that rise from the top and the sides of the subject."""
    solid = subject_mask > 0.5
    roots = _flame_roots(solid)
    minimum = len(roots)
    roots = np.tile(roots, (4, 1))
    roots += generator.uniform((-5, 4), (5, 12), roots.shape)
    roots = roots.clip((4, 34), (_EDGE - 4, _EDGE))
    size = generator.uniform((7.5, 27), (10.5, 40), roots.shape)
    sway = generator.uniform(-8, 8, len(roots))
    outer, orange, core = (_flame_tongues(roots, size * part, sway * part) for part in (1.0, 0.74, 0.42))

    # Most flames rise behind the subject, which would otherwise disappear; every third one licks over it.
    behind, before = Image.new("L", (_EDGE, _EDGE)), Image.new("L", (_EDGE, _EDGE))
    used = len(outer)
    for index, polygon in enumerate(outer):
        # Every root burns; later rounds only fill up what small or slender subjects leave open.
        if index >= minimum:
            visible = np.where(solid, 0, np.asarray(behind)) | np.asarray(before)
            if np.count_nonzero(visible) > _FLAME_COVERAGE * _EDGE**2:
                used = index
                break
        ImageDraw.Draw(before if index % 3 == 0 else behind).polygon(polygon, fill=255)

    layer = Image.new("RGBA", (_EDGE, _EDGE))
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


def _add_smoke_and_glow(background: Floats, flame_mask: Floats, generator: np.random.Generator) -> Floats:
    smoke_image = Image.new("L", (_EDGE, _EDGE))
    pen = ImageDraw.Draw(smoke_image)
    middle = float(generator.uniform(40, 88))
    for step in range(4):
        x, y, radius = middle + generator.uniform(-14, 14), 30 - 10 * step, 9 + 3 * step
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=150)
    smoke = _blurred(_as_floats(smoke_image), 5)
    glow = _blurred(flame_mask, 7)
    smoky = _blend(background, 0.3, smoke)
    return _blend(smoky, np.array([1.0, 0.55, 0.1], dtype=np.float32), glow * 0.6)


def _photo(layers: _Layers, generator: np.random.Generator) -> Floats:
    """Style: smooth shading, a soft shadow and a slight gradient of light."""
    shadow = np.roll(_blurred(layers.subject_mask, 5), (7, 6), axis=(0, 1))
    shadowed = layers.background * (1 - 0.4 * shadow[..., None])
    rows, columns = np.indices((_EDGE, _EDGE), dtype=np.float32) / np.float32(_EDGE)
    # The blurred mask is highest in the middle of the subject, which makes flat fills look round.
    roundness = 0.72 + 0.36 * _blurred(layers.subject_mask, 7)
    lit_subject = layers.subject * (roundness * (1.12 - 0.24 * rows))[..., None]
    picture = _blend(_blend(shadowed, lit_subject, layers.subject_mask), layers.flames, layers.flame_mask)
    slant = generator.uniform(-0.12, 0.12)
    light: Floats = (1.04 - 0.1 * rows + slant * (columns - 0.5))[..., None]
    return picture * light


def _van_gogh(layers: _Layers, generator: np.random.Generator) -> Floats:
    """Style: thick curved strokes along a swirling flow, in a palette pushed towards yellow and blue."""
    scene = layers.without_flames()
    warmth = (scene[..., 0] - scene[..., 2])[..., None]
    light = (scene @ _LUMINANCE)[..., None]
    blue, yellow = np.array([0.06, 0.2, 0.62], dtype=np.float32), np.array([1.0, 0.8, 0.2], dtype=np.float32)
    palette = blue + (yellow - blue) * np.clip(1.4 * light + 1.6 * warmth - 0.6, 0, 1)
    strength = 0.6 - 0.42 * layers.subject_mask
    painted = _saturated(_blend(scene, palette, strength), 1.35)
    painted = _blend(painted, layers.flames, layers.flame_mask)

    per_edge = 16
    spacing = _EDGE / per_edge
    grid = np.indices((per_edge, per_edge)).reshape(2, -1).T * spacing + spacing / 2
    positions = generator.permutation(grid + generator.uniform(-spacing / 2, spacing / 2, grid.shape))
    centres = generator.uniform(0, _EDGE, (3, 2))
    spin = generator.choice([-1, 1], 3)
    offset = positions[:, None] - centres
    pull = spin * np.exp(-(offset**2).sum(axis=2) / (2 * 34**2))
    flow_x = (-pull * offset[..., 0]).sum(axis=1) + 6
    flow_y = (pull * offset[..., 1]).sum(axis=1) + 8 * np.sin(positions[:, 1] / 14)
    angle = np.arctan2(flow_y, flow_x)
    strokes = _brush_strokes(painted, positions, angle, generator)

    # Strokes as coarse as these would dissolve the subject and the flames, hence a thin repainting of both.
    strokes = _blend(strokes, painted, 0.35 * np.maximum(layers.subject_mask, layers.flame_mask))
    return _blend(strokes, blue * 0.3, layers.subject_lines() * (1 - layers.flame_mask) * 0.65)


def _brush_strokes(
    painted: Floats, positions: npt.NDArray[np.float64], angle: npt.NDArray[np.float64], generator: np.random.Generator
) -> Floats:
    """Paint bent strokes that take their colour from a picture, each with a light ridge as of thick paint."""
    image = _as_image(painted * 0.8)
    pen = ImageDraw.Draw(image)
    rows, columns = positions.astype(int).clip(0, _EDGE - 1).T
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
    return _as_floats(image)


def _pixel_art(layers: _Layers, generator: np.random.Generator) -> Floats:
    """Style: blocks of 2x2 final pixels, few colour levels and a black outline around the subject."""
    block = 2 * _SUPERSAMPLING
    dither = generator.uniform(-0.04, 0.04)
    blocks = _as_floats(_as_image(layers.without_flames()).reduce(block))
    covered = _as_floats(_as_image(layers.subject_mask).reduce(block)) > 0.45
    flames = layers.flames[block // 2 :: block, block // 2 :: block]
    burning = _as_floats(_as_image(layers.flame_mask).reduce(block)) > 0.5
    burning &= flames.any(axis=2)
    outline = ndimage.binary_dilation(covered) & ~covered
    levels = np.round(np.clip(_saturated(blocks, 1.3) + dither, 0, 1) * 3) / 3
    levels[outline] = 0
    levels[burning] = np.round(flames[burning] * 3) / 3
    picture: Floats = levels.repeat(block, axis=0).repeat(block, axis=1)
    return picture


def _pencil_sketch(layers: _Layers, generator: np.random.Generator) -> Floats:
    """Style: dark outlines and hatching in grey on white paper; only flames keep a warm tint."""
    tone = _blend(layers.background * 0.4 + 0.6, layers.subject, layers.subject_mask) @ _LUMINANCE
    rows, columns = np.indices((_EDGE, _EDGE), dtype=np.float32)
    wobble = 5 * _smooth_noise(generator, 6)
    rising = np.sin((rows + columns + wobble) * (2 * np.pi / 12)) > 0.1
    falling = np.sin((rows - columns + wobble) * (2 * np.pi / 12)) > 0.2
    ink = np.where(rising & (tone < 0.8), 0.42 - 0.14 * layers.subject_mask, 0.0)
    ink = np.maximum(ink, np.where(falling & (tone < 0.42), 0.5 - 0.14 * layers.subject_mask, 0.0))
    ink = np.where(tone < 0.22, np.maximum(ink, 0.6), ink)
    ink = np.maximum(ink, layers.subject_lines() * 0.85) * (1 - layers.flame_mask)
    ink = np.maximum(ink, layers.flame_lines() * 0.8).astype(np.float32)
    paper = np.full((_EDGE, _EDGE, 3), 0.97, dtype=np.float32) - 0.05 * _smooth_noise(generator, 32)[..., None]
    tinted = _blend(paper, layers.flames * 0.85 + 0.15, layers.flame_mask * 0.85)
    return _blend(tinted, 0.16, ink)


def _stained_glass(layers: _Layers, generator: np.random.Generator) -> Floats:
    """Style: cells of saturated glass between black lead, with the subject cut out along its outline."""
    per_edge = 6
    spacing = _EDGE / per_edge
    grid = np.indices((per_edge, per_edge)).reshape(2, -1) * spacing + spacing / 2
    seeds = (grid + generator.uniform(-spacing / 2.6, spacing / 2.6, grid.shape)).astype(np.float32)
    # Half the resolution is fine enough for lead and four times faster.
    axis = np.arange(0, _EDGE, 2, dtype=np.float32)[:, None]
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
    coloured = _saturated(_blend(glass, picture, drawn), 2.0)

    cell_lead = _contrast(cells) > 0
    cell_lead &= region == 0
    pane_lead = _contrast(region) > 0
    thick = ndimage.binary_dilation(cell_lead | pane_lead)
    inner = layers.subject_lines() * (region == 1) * 0.6
    return _blend(_blend(coloured, 0.02, inner), 0.02, thick.astype(np.float32))


def _pointillism(layers: _Layers, generator: np.random.Generator) -> Floats:
    """Style: separate dots of pure colour on a light ground."""
    picture = layers.flattened()
    ground = np.array([0.97, 0.95, 0.88], dtype=np.float32)
    underpainting = 0.15 + 0.4 * np.maximum(layers.subject_mask, layers.flame_mask)
    image = _as_image(_blend(np.broadcast_to(ground, picture.shape), picture, underpainting))
    pen = ImageDraw.Draw(image)
    spacing = 10.0
    rows, columns = np.mgrid[0 : _EDGE + spacing : spacing, 0 : _EDGE + spacing : spacing]
    columns[::2] += spacing / 2
    positions = np.stack([rows, columns], axis=-1).reshape(-1, 2)
    positions = positions + generator.uniform(-1, 1, positions.shape)
    row_index, column_index = positions.astype(int).clip(0, _EDGE - 1).T
    sampled = _saturated(picture, 1.7)[row_index, column_index]
    jitter = generator.normal(0, 0.12, sampled.shape) * (1 - layers.flame_mask[row_index, column_index, None])
    colours = ((sampled + jitter).clip(0, 1) * 255).astype(int)
    radii = generator.uniform(3.6, 4.4, len(positions))
    for (y, x), radius, colour in zip(positions.tolist(), radii.tolist(), colours.tolist(), strict=True):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(colour))
    contours = layers.subject_lines() * (1 - layers.flame_mask)
    return _blend(_as_floats(image), picture * 0.4, contours * 0.4)


def _watercolour(layers: _Layers, generator: np.random.Generator) -> Floats:
    """Style: pale washes that bleed into each other and fade into the white of the paper."""
    drift_y, drift_x = (10 * (_smooth_noise(generator, 10) - 0.5) for _ in range(2))
    rows, columns = np.mgrid[0:_EDGE, 0:_EDGE]
    source_rows = (rows + drift_y).astype(int).clip(0, _EDGE - 1)
    source_columns = (columns + drift_x).astype(int).clip(0, _EDGE - 1)
    washed = _blurred(layers.flattened()[source_rows, source_columns], 2.2)
    # Pigment gathers where a wash dries, which darkens the rim of every shape a little.
    washed = _blend(washed, washed * 0.4, 0.45 * layers.subject_lines()[source_rows, source_columns])
    kept = np.maximum(layers.subject_mask, layers.flame_mask)[source_rows, source_columns]

    pigment = 0.4 + 0.25 * _smooth_noise(generator, 7) + 0.15 * kept
    border = np.minimum(np.minimum(rows, _EDGE - 1 - rows), np.minimum(columns, _EDGE - 1 - columns))
    ragged = border - 14 + 22 * (_smooth_noise(generator, 8) - 0.5)
    wash = np.clip(ragged / 10, 0, 1).astype(np.float32)
    pigment = pigment * np.maximum(wash, 0.85 * _blurred(kept, 2))
    paper = np.ones_like(washed)
    return _blend(paper, _saturated(washed, 1.25), pigment)


def _neon(layers: _Layers, generator: np.random.Generator) -> Floats:
    """Style: glowing coloured outlines on a nearly black ground."""
    local = layers.subject / np.maximum(layers.subject.max(axis=2, keepdims=True), 0.25)
    tube = _saturated(0.5 * local + 0.5 * layers.body / layers.body.max(), 1.5)
    lines = layers.subject_lines()
    spread_colour = _blurred(_blend(np.broadcast_to(layers.body, tube.shape), tube, layers.subject_mask), 2)
    hue = generator.uniform(0.6, 1.0, 3).astype(np.float32) * np.array([0.07, 0.04, 0.12], dtype=np.float32)
    dark = layers.background * 0.06 + hue
    lit = _blend(dark, layers.subject * 0.16, layers.subject_mask)
    glow = _blurred(spread_colour * lines[..., None], 5)
    lit = lit + 1.3 * glow
    lit = _blend(lit, spread_colour * 0.85 + 0.15, lines)
    if not layers.flame_mask.any():
        return lit
    burning = _blend(lit, layers.flames, layers.flame_mask * 0.9)
    return burning + _blurred(layers.flames * layers.flame_mask[..., None], 6) * 0.35


_STYLES: dict[str, Callable[[_Layers, np.random.Generator], Floats]] = {
    "photo": _photo,
    "van_gogh": _van_gogh,
    "pixel_art": _pixel_art,
    "pencil_sketch": _pencil_sketch,
    "stained_glass": _stained_glass,
    "pointillism": _pointillism,
    "watercolour": _watercolour,
    "neon": _neon,
}
