"""A sheet of labelled pictures: models in rows, seeds in columns, the prompt above."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw
from torch import Tensor

from experiments.results.grid import INK, drawable, enlarged, shown_size

_MARGIN = 12
_LINE = 22
_LABELS = 150


def draw_sheet(prompt: str, seeds: Sequence[int], pictures: Mapping[str, Tensor], title: str) -> Image.Image:
    """Draw pictures of one prompt.

    Args:
        prompt: What they are of.
        seeds: Of the columns.
        pictures: Of each row, by its label; uint8 [seeds, 3, H, W].
        title: What stands above all.
    """
    height, width = shown_size(next(iter(pictures.values())))
    lines = [(prompt, 16), (title, 14)]
    top = _MARGIN + len(lines) * _LINE
    text_width = max(drawable(text, size)[1].getlength(drawable(text, size)[0]) for text, size in lines)
    right = max(_LABELS + len(seeds) * (width + _MARGIN), round(text_width)) + _MARGIN
    canvas = Image.new("RGB", (right, top + _LINE + len(pictures) * (height + _MARGIN)), "white")
    pen = ImageDraw.Draw(canvas)

    def write(place: tuple[int, int], text: str, size: int = 14) -> None:
        shown, font = drawable(text, size)
        pen.text(place, shown, fill=INK, font=font)

    for number, (text, size) in enumerate(lines):
        write((_MARGIN, _MARGIN + number * _LINE), text, size)
    for column, seed in enumerate(seeds):
        write((_LABELS + column * (width + _MARGIN), top), f"seed {seed}")
    for row, (label, images) in enumerate(pictures.items()):
        y = top + _LINE + row * (height + _MARGIN)
        write((_MARGIN, y), label)
        for column, image in enumerate(images):
            canvas.paste(enlarged(image, (width, height)), (_LABELS + column * (width + _MARGIN), y))
    return canvas
