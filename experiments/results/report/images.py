"""Pictures inside the page."""

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

LARGEST = 384
"""Pixels; larger pictures are made so small, as a page of hundreds is to open on a phone."""


def data_uri(path: Path) -> str | None:
    """The picture at ``path`` as a data URI, and nothing else that the file says; None where there is no such file.

    Raises:
        ValueError: The file is no picture.
    """
    if not path.is_file():
        return None
    picture = open_picture(path)
    content = io.BytesIO()
    if max(picture.size) > LARGEST:
        picture.thumbnail((LARGEST, LARGEST))
        picture.save(content, "WEBP", quality=85)
        kind = "webp"
    else:
        # Small pictures pixel by pixel, without the text that the store's files carry.
        picture.save(content, "PNG", optimize=True)
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def difference(one: Path, other: Path) -> float:
    """Root mean square difference of two pictures' pixels, 0 to 1.

    Raises:
        ValueError: A file is no picture, or their sizes differ.
    """
    first, second = (np.asarray(open_picture(path), dtype=np.float64) / 255 for path in (one, other))
    if first.shape != second.shape:
        raise ValueError(f"{one} and {other} cannot be compared: their sizes differ.")
    return float(np.sqrt(((first - second) ** 2).mean()))


def open_picture(path: Path) -> Image.Image:
    """The picture at ``path``, RGB.

    Raises:
        ValueError: The file is no picture.
    """
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run the same command again.") from error
