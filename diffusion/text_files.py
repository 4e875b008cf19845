"""Any text in files and places that read more into it than a text: spreadsheets, terminals, Markdown."""

import csv
import io
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Categories of Unicode that are no ink: control and format characters, what is unassigned, breaks of lines."""

_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_QUOTED_FORMULA = re.compile(r"'+[=+\-@\t\r]")
_MARKDOWN = re.compile(r"[\\`|<&]|(?<=\])\(")


def visible(text: str) -> str:
    r"""``text`` with every character that is no ink written out, so that a terminal is told nothing.

    >>> print(visible("a\x1b[2Jb\nc"))
    a\x1b[2Jb\nc
    """
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in _INVISIBLE else char for char in text
    )


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    r"""Rows as CSV that every reader takes for the same cells, whatever text they hold.

    None is an empty cell. A text that a spreadsheet program would take for a formula gets a ``'`` in front, which
    :func:`plain_cell` takes away.

    >>> csv_text(["n", "text"], [(1, "=cmd"), (2, "a\rb")])
    'n,text\n1,\'=cmd\n2,"a\rb"\n'
    """
    return "".join(map(_csv_line, [columns, *rows]))


def plain_cell(cell: str) -> str:
    """The text that :func:`csv_text` wrote as ``cell``."""
    return cell[1:] if _QUOTED_FORMULA.match(cell) else cell


def markdown_cell(text: str) -> str:
    r"""``text`` as a cell of a Markdown table: no end of the cell, no HTML, no link, no code.

    >>> print(markdown_cell("a|b <img> [1, 2]"))
    a\|b \<img> [1, 2]
    """
    return _MARKDOWN.sub(r"\\\g<0>", visible(text))


def _csv_line(cells: Sequence[Any]) -> str:
    line = io.StringIO()
    # Python 3.11's writer quotes the line breaks that its own lines end in, and leaves others bare.
    csv.writer(line, lineterminator="\r\n").writerow([_safe(cell) if isinstance(cell, str) else cell for cell in cells])
    return line.getvalue()[:-2] + "\n"


def _safe(text: str) -> str:
    return f"'{text}" if _FORMULA.match(text) else text
