"""Pixels of layers: their size, colours, and how they are mixed."""

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from diffusion.canvas.world import IMAGE_SIZE

Floats = npt.NDArray[np.floating[Any]]
Rgb = tuple[int, int, int]
SUPERSAMPLING = 4

EDGE = IMAGE_SIZE * SUPERSAMPLING
"""Edge of the layers in pixels. All coordinates below are in these pixels, with y pointing down."""

WHITE: Rgb = (244, 244, 240)
LIGHT_GREY: Rgb = (196, 200, 206)
GREY: Rgb = (124, 128, 136)
DARK: Rgb = (38, 38, 46)
GLASS: Rgb = (182, 218, 238)
LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def as_floats(image: Image.Image) -> Floats:
    """An image as floats [h, w, channels] in 0 .. 1."""
    pixels: Floats = np.multiply(np.asarray(image), np.float32(1 / 255))
    return pixels


def as_image(pixels: Floats) -> Image.Image:
    """The reverse of :func:`as_floats`, clipped."""
    scaled = pixels * 255
    scaled += 0.5
    return Image.fromarray(np.clip(scaled, 0, 255, out=scaled).astype(np.uint8))


def split_alpha(image: Image.Image) -> tuple[Floats, Floats]:
    """The colours of an image and its opacity, float [h, w, 3] and [h, w, 1]."""
    return as_floats(image.convert("RGB")), as_floats(image.getchannel("A"))


def blend(below: Floats, above: Floats | float, opacity: Floats) -> Floats:
    """``above`` over ``below`` where it is opaque."""
    # In place, because temporaries of this size cost more than the arithmetic.
    blended: Floats = np.subtract(above, below)
    for channel in range(blended.shape[2]):
        blended[..., channel] *= opacity
    blended += below
    return blended


def blurred(pixels: Floats, radius: float) -> Floats:
    """Blur a picture or a mask; the kernel is a box, or close to a Gaussian where it is wide enough to matter."""
    image = as_image(pixels)
    if radius < 4:
        return as_floats(image.filter(ImageFilter.BoxBlur(radius)))
    # A wide blur leaves nothing that a quarter of the resolution could not hold, and there it is far cheaper.
    small = image.reduce(4).filter(ImageFilter.GaussianBlur(radius / 4))
    return as_floats(small.resize(image.size, Image.Resampling.BILINEAR))


def saturated(pixels: Floats, amount: float) -> Floats:
    """Colours further from grey, or nearer to it below 1."""
    grey = (pixels @ LUMINANCE)[..., None]
    return np.clip(grey + (pixels - grey) * amount, 0, 1)


def contrast(*planes: npt.NDArray[Any]) -> Floats:
    """Return the largest change of any plane, each [edge, edge], across three pixels, [edge, edge]."""
    strongest = np.zeros((EDGE, EDGE), dtype=np.float32)
    for plane in planes:
        padded = np.pad(plane.astype(np.float32), (2, 1), mode="edge")
        np.maximum(strongest, np.abs(padded[2:-1, 3:] - padded[2:-1, :-3]), out=strongest)
        np.maximum(strongest, np.abs(padded[3:, 2:-1] - padded[:-3, 2:-1]), out=strongest)
    return strongest


def smooth_noise(generator: np.random.Generator, cells: int) -> Floats:
    """Return smooth random values within 0 and 1 that vary over ``cells`` cells per edge, [edge, edge]."""
    coarse = Image.fromarray(generator.integers(0, 256, (cells, cells), dtype=np.uint8))
    return as_floats(coarse.resize((EDGE, EDGE), Image.Resampling.BICUBIC))


def scaled(colour: Rgb, factor: float) -> Rgb:
    """Return a darker (factor below 1) or lighter shade of a colour."""
    red, green, blue = (min(255, round(channel * factor)) for channel in colour)
    return red, green, blue


def gradient(top: Rgb, bottom: Rgb) -> Image.Image:
    """Return a picture that fades from one colour at the top to another at the bottom."""
    fraction = np.linspace(0, 1, EDGE)[:, None, None]
    rows = (1 - fraction) * np.array(top) + fraction * np.array(bottom)
    return Image.fromarray(np.broadcast_to(rows, (EDGE, EDGE, 3)).astype(np.uint8))
