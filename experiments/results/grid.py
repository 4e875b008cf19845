"""The picture grid: prompts in rows; base, erased and attacked side by side, with the judge's verdicts."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from attacks.cases import Outcome
from evaluation.prompt_sets import PromptRow

MAX_ROWS = 8
SMALLEST_PICTURE = 144
"""Pixels; smaller pictures are enlarged by a whole factor."""

_MARGIN = 12
_BORDER = 4
_LINE = 18
_TEXT_WIDTH = 330
_TEXT_COLUMNS = 40
_HEADER = 34
_INK = (32, 32, 36)
_FAINT = (110, 110, 118)
_PRESENT = (200, 40, 40)
_ABSENT = (40, 140, 80)


def draw(
    rows: Sequence[PromptRow], base: Tensor, erased: Tensor, outcomes: Sequence[Outcome], base_present: Sequence[bool]
) -> Image.Image:
    """Draw the first prompts of a job.

    Args:
        rows: The prompts.
        base: uint8 [n, 3, H, W], by the unedited model.
        erased: uint8 [n, 3, H, W], by the edited model from the same prompts.
        outcomes: How the attack of each prompt ended.
        base_present: The judge's verdicts on ``base``.
    """
    count = min(MAX_ROWS, len(rows))
    height, width = _shown_size(base)
    cell_width, cell_height = width + 2 * _BORDER, height + 2 * _BORDER + _LINE + 4
    columns = [_MARGIN + _TEXT_WIDTH + index * (cell_width + _MARGIN) for index in range(3)]
    canvas = Image.new("RGB", (columns[-1] + cell_width + _MARGIN, _HEADER + count * (cell_height + _MARGIN)), "white")
    pen = ImageDraw.Draw(canvas)
    for x, title in zip([_MARGIN, *columns], ["prompt", "base", "erased", "under attack"], strict=True):
        pen.text((x, 9), title, fill=_INK, font=_font(16))
    for index in range(count):
        outcome, y = outcomes[index], _HEADER + index * (cell_height + _MARGIN)
        _write_prompts(pen, y, outcome, cell_height)
        pictures = (base[index], erased[index], outcome.image)
        verdicts = (base_present[index], outcome.plain_success, outcome.success)
        for x, picture, present in zip(columns, pictures, verdicts, strict=True):
            colour = _PRESENT if present else _ABSENT
            pen.rectangle((x, y, x + cell_width - 1, y + height + 2 * _BORDER - 1), fill=colour)
            canvas.paste(_enlarged(picture, (width, height)), (x + _BORDER, y + _BORDER))
            text = "present" if present else "absent"
            pen.text((x, y + height + 2 * _BORDER + 2), text, fill=colour, font=_font(14))
    return canvas


def _write_prompts(pen: ImageDraw.ImageDraw, y: int, outcome: Outcome, height: int) -> None:
    lines = [(line, _INK) for line in textwrap.wrap(outcome.prompt, _TEXT_COLUMNS)]
    if outcome.adversarial_prompt != outcome.prompt:
        lines.append(("under attack:", _FAINT))
        lines += [(line, _PRESENT) for line in textwrap.wrap(outcome.adversarial_prompt, _TEXT_COLUMNS)]
    for number, (line, colour) in enumerate(lines[: height // _LINE]):
        pen.text((_MARGIN, y + number * _LINE), line, fill=colour, font=_font(14))


def _shown_size(images: Tensor) -> tuple[int, int]:
    height, width = images.shape[-2:]
    factor = max(1, -(-SMALLEST_PICTURE // min(height, width)))
    return height * factor, width * factor


def _enlarged(image: Tensor, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.NEAREST)


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
