"""Prompt sets: CSV files in the format of the field, one prompt per row with its seed and guidance scale."""

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

DEFAULT_SEED = 0
DEFAULT_GUIDANCE = 7.5
"""What a file without these columns means, as in UnlearnDiffAtk's published code."""

_REQUIRED = ("case_number", "prompt")
_SETTINGS = ("evaluation_seed", "evaluation_guidance")
_MOST_REPORTED = 5


@dataclass(frozen=True)
class PromptRow:
    """One prompt and how its picture is made.

    Attributes:
        case_number: Its number in the set; unique.
        prompt: The text.
        seed: Seed of its picture.
        guidance: Guidance scale of its picture.
        labels: Every further column of the file by name (on the canvas the ground truth: style, subject, burning).
    """

    case_number: int
    prompt: str
    seed: int = DEFAULT_SEED
    guidance: float = DEFAULT_GUIDANCE
    labels: Mapping[str, str] = field(default_factory=dict)


def read_prompt_set(path: Path, limit: int | None = None) -> list[PromptRow]:
    """Read the prompts of a UTF-8 CSV file in the order of its rows.

    The columns ``case_number`` and ``prompt`` must be there, ``evaluation_seed`` and ``evaluation_guidance`` may be;
    their order is free, and what else the file has becomes labels.

    Args:
        path: The file.
        limit: Return the first rows only; the whole file is checked all the same.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: ``limit`` is less than 1, a column is missing, a row is broken, or there are no rows.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; a prompt set can be cut to 1 prompt or more.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no prompt set {path}; name a CSV file with the columns case_number,prompt.")
    rows: list[PromptRow] = []
    faults: list[str] = []
    first_lines: dict[int, int] = {}
    with csv_rows(path, _REQUIRED) as reader:
        for cells in reader:
            try:
                row = _parse(cells)
                if row.case_number in first_lines:
                    known = first_lines[row.case_number]
                    raise ValueError(f"case_number {row.case_number} is that of line {known} too")
            except ValueError as fault:
                faults.append(f"line {reader.line_num}: {fault}")
            else:
                first_lines[row.case_number] = reader.line_num
                rows.append(row)
    if faults:
        more = f" (and {len(faults) - _MOST_REPORTED} more)" if len(faults) > _MOST_REPORTED else ""
        raise ValueError(f"{path} has broken rows; correct {'; '.join(faults[:_MOST_REPORTED])}{more}.")
    if not rows:
        raise ValueError(f"{path} has no prompts below its first line.")
    return rows[:limit]


@contextmanager
def csv_rows(path: Path, required: Sequence[str]) -> Iterator["csv.DictReader[str]"]:
    """Open a UTF-8 CSV file whose first line names its columns.

    Raises:
        ValueError: One of the ``required`` columns is missing, or the file turns out to be no such CSV file.
    """
    # A byte-order mark is what spreadsheet programs put first.
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            reader = csv.DictReader(file, strict=True)
            missing = [column for column in required if column not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"{path} lacks the columns {', '.join(missing)}; its first line must name them.")
            yield reader
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path} is not a CSV file in UTF-8: {error}.") from error


def _parse(cells: dict[str, str]) -> PromptRow:
    """Read one row; a ValueError says what is wrong with it."""
    if None in cells or None in cells.values():
        raise ValueError("it has more or fewer cells than there are columns")
    prompt = cells["prompt"].strip()
    if not prompt:
        raise ValueError("the prompt is empty")
    guidance = _number(cells, "evaluation_guidance", DEFAULT_GUIDANCE)
    return PromptRow(
        case_number=_integer(cells, "case_number", 0),
        prompt=prompt,
        seed=_integer(cells, "evaluation_seed", DEFAULT_SEED),
        guidance=guidance,
        labels={column: text for column, text in cells.items() if column not in {*_REQUIRED, *_SETTINGS}},
    )


def _integer(cells: dict[str, str], column: str, default: int) -> int:
    text = cells.get(column, str(default))
    if not (text.strip().isascii() and text.strip().isdigit()):
        raise ValueError(f"{column} is {text!r}, not a whole number from 0")
    return int(text)


def _number(cells: dict[str, str], column: str, default: float) -> float:
    text = cells.get(column, str(default))
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{column} is {text!r}, not a number from 0")
    return number
