"""Where scenes take place: the backgrounds."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from diffusion.canvas.drawing.pixels import EDGE, WHITE, gradient, scaled


def _meadow(generator: np.random.Generator) -> Image.Image:
    image = gradient((110, 176, 236), (214, 234, 246))
    pen = ImageDraw.Draw(image)
    horizon = int(generator.integers(64, 84))
    hill = int(generator.integers(0, EDGE))
    pen.ellipse((hill - 80, horizon - 14, hill + 80, horizon + 60), fill=(92, 160, 84))
    pen.rectangle((0, horizon, EDGE, EDGE), fill=(112, 186, 76))
    for x, y in generator.integers((0, horizon + 4), (EDGE, EDGE), (14, 2)).tolist():
        pen.ellipse((x, y, x + 4, y + 4), fill=(236, 244, 220))
    return image


def _beach(generator: np.random.Generator) -> Image.Image:
    image = gradient((150, 210, 242), (222, 240, 246))
    pen = ImageDraw.Draw(image)
    horizon = int(generator.integers(52, 66))
    shore = horizon + int(generator.integers(18, 28))
    pen.rectangle((0, horizon, EDGE, shore), fill=(30, 130, 176))
    pen.rectangle((0, shore, EDGE, EDGE), fill=(236, 216, 164))
    pen.line([(x, shore + 3 * (x // 16 % 2)) for x in range(0, EDGE + 16, 16)], fill=WHITE, width=5)
    return image


def _snow(generator: np.random.Generator) -> Image.Image:
    image = gradient((172, 186, 204), (214, 222, 232))
    pen = ImageDraw.Draw(image)
    horizon = int(generator.integers(66, 84))
    for x in generator.integers(0, EDGE, 4).tolist():
        pen.polygon([(x - 10, horizon + 2), (x, horizon - 28), (x + 10, horizon + 2)], fill=(70, 96, 96))
    pen.rectangle((0, horizon, EDGE, EDGE), fill=(240, 244, 250))
    for x, y in generator.integers(0, EDGE, (24, 2)).tolist():
        pen.ellipse((x, y, x + 4, y + 4), fill=(252, 252, 255))
    return image


def _city(generator: np.random.Generator) -> Image.Image:
    image = gradient((176, 190, 204), (212, 216, 220))
    pen = ImageDraw.Draw(image)
    street = int(generator.integers(88, 102))
    for left in range(-6, EDGE, 22):
        roof = int(generator.integers(10, 62))
        wall = scaled((128, 126, 134), float(generator.uniform(0.75, 1.2)))
        pen.rectangle((left, roof, left + 20, street), fill=wall)
        for window_top in range(roof + 6, street - 6, 12):
            pen.rectangle((left + 4, window_top, left + 8, window_top + 5), fill=scaled(wall, 0.65))
            pen.rectangle((left + 12, window_top, left + 16, window_top + 5), fill=scaled(wall, 0.65))
    pen.rectangle((0, street, EDGE, EDGE), fill=(92, 92, 98))
    for left in range(int(generator.integers(-12, 12)), EDGE, 36):
        pen.rectangle((left, street + 12, left + 18, street + 15), fill=(220, 220, 216))
    return image


def _desert(generator: np.random.Generator) -> Image.Image:
    image = gradient((142, 190, 214), (238, 226, 196))
    pen = ImageDraw.Draw(image)
    horizon = int(generator.integers(62, 78))
    dune = int(generator.integers(0, EDGE))
    pen.rectangle((0, horizon, EDGE, EDGE), fill=(208, 164, 106))
    pen.ellipse((dune - 70, horizon - 12, dune + 70, horizon + 50), fill=(190, 144, 90))
    pen.ellipse((dune - 150, horizon + 8, dune + 10, horizon + 90), fill=(220, 180, 122))
    stem, green = int(generator.choice([10, 112])), (64, 112, 70)
    pen.line([(stem, horizon + 10), (stem, horizon - 26)], fill=green, width=6)
    pen.line([(stem, horizon - 6), (stem + 9, horizon - 6), (stem + 9, horizon - 16)], fill=green, width=4)
    return image


def _night(generator: np.random.Generator) -> Image.Image:
    image = gradient((14, 18, 52), (44, 52, 104))
    pen = ImageDraw.Draw(image)
    horizon = int(generator.integers(80, 98))
    for x, y in generator.integers((0, 0), (EDGE, horizon), (16, 2)).tolist():
        pen.ellipse((x, y, x + 3, y + 3), fill=(226, 230, 246))
    moon = int(generator.choice([8, 98]))
    pen.ellipse((moon, 8, moon + 22, 30), fill=(232, 236, 240))
    pen.rectangle((0, horizon, EDGE, EDGE), fill=(24, 34, 44))
    return image


BACKGROUNDS: dict[str, Callable[[np.random.Generator], Image.Image]] = {
    "meadow": _meadow,
    "beach": _beach,
    "snow": _snow,
    "city": _city,
    "desert": _desert,
    "night": _night,
}
