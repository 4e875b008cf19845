"""Pictures in files that others made."""

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import groupby, islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from diffusion.files import stands_in

Item = TypeVar("Item")


_NOT_READ = frozenset({"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5"})
"""Formats that Pillow knows and gives to other programs, or to nobody."""

_BRIGHTEST = 65535
"""White of pictures with 16 bits a pixel."""


def is_picture_file(file: Path, folder: Path) -> bool:
    """Whether a file somewhere in ``folder`` has the suffix of a format that is read, and is not hidden.

    Files and folders whose names begin with a dot are what systems keep beside pictures.
    """
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and file.suffix.lower() in picture_suffixes() and file.is_file()


@cache
def picture_suffixes() -> frozenset[str]:
    """The suffixes, in small letters, of the formats that Pillow reads by itself."""
    formats = readable_formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


@cache
def readable_formats() -> tuple[str, ...]:
    """The formats that Pillow reads by itself; PostScript, which is a program, is not among them."""
    Image.init()
    return tuple(sorted(Image.OPEN.keys() - _NOT_READ))


def read_picture_file(file: Path) -> Tensor:
    """The RGB pixels of a picture file as it is to be looked at, uint8 [3, H, W].

    A turn that the camera has noted (EXIF) is made; 16 bits a pixel become 8; of several frames the first counts.

    Raises:
        ValueError: The file is no picture, or its values have no white.
    """
    try:
        with Image.open(file, formats=readable_formats()) as picture:
            upright = ImageOps.exif_transpose(picture)
            pixels: Tensor = pil_to_tensor(_in_eight_bits(upright).convert("RGB"))
            return pixels
    except (OSError, SyntaxError, ValueError) as error:
        fault = stands_in(file) or f"is no picture that can be read ({error})"
        raise ValueError(f"{file} {fault}.") from error


def _in_eight_bits(picture: Image.Image) -> Image.Image:
    """The picture with 8 bits a pixel and channel, where it has more.

    Raises:
        ValueError: What white is cannot be known.
    """
    if not picture.mode.startswith(("I", "F")):
        return picture
    values = np.asarray(picture)
    if picture.mode == "F" or values.min() < 0 or values.max() > _BRIGHTEST:
        raise ValueError("its values are no whole numbers of 8 or 16 bits, so that white is not known; save it as PNG")
    return Image.fromarray((values.astype(np.float64) * (255 / _BRIGHTEST)).round().astype(np.uint8))


def neighbours(items: Iterable[Item], size: int, picture: Callable[[Item], Tensor]) -> Iterator[list[Item]]:
    """Put up to ``size`` neighbours whose pictures have one shape together."""
    for _, alike in groupby(items, lambda item: picture(item).shape):
        while part := list(islice(alike, size)):
            yield part
