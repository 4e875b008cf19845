"""The picture grid: prompts in rows; base, erased and attacked side by side, with the judge's verdicts."""

from bisect import bisect
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import matplotlib as mpl
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from attacks.cases import Outcome
from diffusion.text_files import visible
from evaluation.prompt_sets import PromptRow

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

MAX_ROWS = 8
SMALLEST_PICTURE = 144
"""Pixels; smaller pictures are enlarged by a whole factor."""

INK = (32, 32, 36)
"""The colour of texts."""

_MARGIN = 12
_BORDER = 4
_LINE = 18
_TEXT_WIDTH = 330
_HEADER = 34
_ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
_BROAD_FONT = str(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
"""A font with most alphabets, which matplotlib brings along."""
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
    height, width = shown_size(base)
    cell_width, cell_height = width + 2 * _BORDER, height + 2 * _BORDER + _LINE + 4
    columns = [_MARGIN + _TEXT_WIDTH + index * (cell_width + _MARGIN) for index in range(3)]
    canvas = Image.new("RGB", (columns[-1] + cell_width + _MARGIN, _HEADER + count * (cell_height + _MARGIN)), "white")
    pen = ImageDraw.Draw(canvas)
    for x, title in zip([_MARGIN, *columns], ["prompt", "base", "erased", "under attack"], strict=True):
        pen.text((x, 9), title, fill=INK, font=_font(16))
    for index in range(count):
        outcome, y = outcomes[index], _HEADER + index * (cell_height + _MARGIN)
        _write_prompts(pen, y, outcome, cell_height)
        pictures = (base[index], erased[index], outcome.image)
        verdicts = (base_present[index], outcome.plain_success, outcome.success)
        for x, picture, present in zip(columns, pictures, verdicts, strict=True):
            colour = _PRESENT if present else _ABSENT
            pen.rectangle((x, y, x + cell_width - 1, y + height + 2 * _BORDER - 1), fill=colour)
            canvas.paste(enlarged(picture, (width, height)), (x + _BORDER, y + _BORDER))
            text = "present" if present else "absent"
            pen.text((x, y + height + 2 * _BORDER + 2), text, fill=colour, font=_font(14))
    return canvas


def _write_prompts(pen: ImageDraw.ImageDraw, y: int, outcome: Outcome, height: int) -> None:
    room = height // _LINE
    plain, found = outcome.prompt, outcome.adversarial_prompt
    if found == plain:
        lines = [(line, INK) for line in _wrapped(plain, room)]
    else:
        # The text under attack has half of the room at least, and what the plain prompt leaves.
        left = room - 1 - len(_wrapped(plain, room))
        under_attack = _wrapped(found, max(left, (room - 1) // 2))
        lines = [(line, INK) for line in _wrapped(plain, room - 1 - len(under_attack))]
        lines += [((["under attack:"], _font(14)), _FAINT), *((line, _PRESENT) for line in under_attack)]
    for number, ((words, font), colour) in enumerate(lines):
        pen.text((_MARGIN, y + number * _LINE), " ".join(words), fill=colour, font=font)


def wrapped(text: str, room: int) -> list[str]:
    """Break a text into at most ``room`` lines as they are drawn; what is cut off leaves an ellipsis."""
    return [" ".join(words) for words, _ in _wrapped(text, room)]


def _wrapped(text: str, room: int) -> list[tuple[list[str], Font]]:
    shown, font = drawable(text)
    lines: list[list[str]] = [[]]
    waiting = shown.split()[::-1]
    while waiting:
        word = waiting.pop()
        if font.getlength(" ".join([*lines[-1], word])) <= _TEXT_WIDTH - _MARGIN:
            lines[-1].append(word)
        elif lines[-1]:
            lines.append([])
            waiting.append(word)
        else:
            # A word that is longer than a line, or text without spaces.
            fits = max(1, bisect([font.getlength(word[: end + 1]) for end in range(len(word))], _TEXT_WIDTH - _MARGIN))
            waiting += [word[fits:], word[:fits]]
    room = max(room, 1)
    if len(lines) > room:
        lines = lines[:room]
        while lines[-1] and font.getlength(" ".join([*lines[-1], _ELLIPSIS])) > _TEXT_WIDTH - _MARGIN:
            lines[-1][-1] = lines[-1][-1][:-1]
            lines[-1] = [word for word in lines[-1] if word]
        lines[-1].append(_ELLIPSIS)
    return [(words, font) for words in lines]


def drawable(text: str, size: int = 14) -> tuple[str, Font]:
    """Find a font that has all of a text, among the installed ones if need be, or write out what no font has.

    Returns:
        The text as it is to be drawn, and the font.
    """
    text = visible(" ".join(text.split()))
    if text.isascii():
        return text, _font(size)
    needed = frozenset(text)
    for path in _font_files():
        if needed <= _letters(path):
            with suppress(OSError):  # fonts of pictures have sizes of their own
                return text, ImageFont.truetype(path, size)
    known = _letters(_BROAD_FONT)
    shown = "".join(char if char in known else char.encode("unicode_escape").decode() for char in text)
    return shown, ImageFont.truetype(_BROAD_FONT, size)


@cache
def _font_files() -> tuple[str, ...]:
    """Paths of fonts in the order of trying: matplotlib's own, then the system's upright ones."""
    upright = [font for font in font_manager.fontManager.ttflist if (font.style, font.weight) == ("normal", 400)]
    # The Last Resort font has a box for every letter.
    others = sorted(font.fname for font in upright if "LastResort" not in font.fname)
    return tuple(dict.fromkeys([_BROAD_FONT, *others]))


@cache
def _letters(path: str) -> frozenset[str]:
    try:
        return frozenset(map(chr, FT2Font(path).get_charmap()))
    except (OSError, RuntimeError):
        return frozenset()


def shown_size(images: Tensor) -> tuple[int, int]:
    """Height and width in which pictures, uint8 [n, 3, H, W], are shown."""
    height, width = images.shape[-2:]
    factor = max(1, -(-SMALLEST_PICTURE // min(height, width)))
    return height * factor, width * factor


def enlarged(image: Tensor, size: tuple[int, int]) -> Image.Image:
    """A picture, uint8 [3, H, W], in the width and height ``size``, its pixels as squares."""
    return Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.NEAREST)


def _font(size: int) -> Font:
    return ImageFont.load_default(size)
