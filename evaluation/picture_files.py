"""Pictures in files that others made."""

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import TypeVar

from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

Item = TypeVar("Item")


def read_picture_file(file: Path) -> Tensor:
    """The RGB pixels of a picture file, uint8 [3, H, W].

    Raises:
        ValueError: The file is no picture.
    """
    try:
        with Image.open(file) as picture:
            pixels: Tensor = pil_to_tensor(picture.convert("RGB"))
            return pixels
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{file} is no picture that can be read ({error}).") from error


def neighbours(items: Iterable[Item], size: int, picture: Callable[[Item], Tensor]) -> Iterator[list[Item]]:
    """Put up to ``size`` neighbours whose pictures have one shape together."""
    for _, alike in groupby(items, lambda item: picture(item).shape):
        while part := list(islice(alike, size)):
            yield part
