"""Tables as files: whatever text is in them stays a text."""

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from diffusion.files import write_atomically
from diffusion.text_files import csv_text, markdown_cell, visible


def markdown_table(table: pd.DataFrame, **options: Any) -> str:
    """``table`` in Markdown, without its index; ``options`` are those of tabulate."""
    text: str = table.map(_escaped).rename(columns=_escaped).to_markdown(index=False, **options)
    return text


MOST_COLUMNS = 9
"""More make a table that nobody reads."""


def narrow(table: pd.DataFrame, keys: Sequence[str], most: int = MOST_COLUMNS) -> list[pd.DataFrame]:
    """``table`` as several of at most ``most`` columns, each of which begins with ``keys``; itself if it is narrow."""
    others = [column for column in table.columns if column not in keys]
    room = most - len(keys)
    if not others:
        return [table]
    return [table[[*keys, *others[start : start + room]]] for start in range(0, len(others), room)]


def latex(table: pd.DataFrame) -> str:
    """``table`` in LaTeX, without its index."""
    plain = table.map(lambda cell: visible(cell) if isinstance(cell, str) else cell)
    return plain.to_latex(index=False, escape=True)


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write ``table``, without its index, as UTF-8 CSV; what is missing is an empty cell."""
    rows = table.astype(object).where(table.notna(), None).itertuples(index=False, name=None)
    write_atomically(path, csv_text([str(column) for column in table.columns], rows))


def _escaped(cell: Hashable) -> Hashable:
    return markdown_cell(cell) if isinstance(cell, str) else cell
