"""Prompt sets: CSV files in the format of the field, one prompt per row with its seed and guidance scale."""

import csv
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Literal

from diffusion.files import require_itself

log = logging.getLogger(__name__)

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


@dataclass(frozen=True)
class Record:
    """One row as its source has it.

    Attributes:
        place: Where it lies there, as in ``line 3``.
        cells: Text by column.
        fault: What is wrong with the row as such, if anything.
    """

    place: str
    cells: Mapping[str, str]
    fault: str = ""


BrokenRows = Literal["refuse", "skip"]
"""What comes of broken rows: the whole set is refused, which never changes how many prompts there are, or they are
left out and the log says which."""


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
    return parse_records(csv_records(path), str(path))[:limit]


def csv_records(path: Path) -> Iterator[Record]:
    """Read the rows of a UTF-8 CSV file whose first line names its columns, with the lines that they lie in.

    Raises:
        ValueError: The file is no such CSV file.
    """
    with csv_rows(path, ()) as reader:
        columns = reader.fieldnames or ()
        first_line = reader.line_num + 1
        # The rows below DictReader's own, which would not tell where a row of several lines begins.
        for cells in reader.reader:
            last_line = reader.reader.line_num
            if cells:
                lines = f"line {last_line}" if first_line == last_line else f"lines {first_line}-{last_line}"
                fault = "" if len(cells) == len(columns) else "it has more or fewer cells than there are columns"
                yield Record(lines, dict(zip_longest(columns, cells[: len(columns)], fillvalue="")), fault)
            first_line = last_line + 1


def line_records(path: Path) -> Iterator[Record]:
    """Read a UTF-8 text file with one prompt per line; blank lines are passed over.

    Raises:
        ValueError: The file is not in UTF-8, or a pointer or a web page in the place of one.
    """
    require_itself(path)
    with path.open(encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield Record(f"line {number}", {"prompt": line})
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not a text file in UTF-8: {error}.") from error


def missing_columns(source: str, missing: Sequence[str], record: Record) -> ValueError:
    """The error of a source that lacks columns, which it has in no row if not in ``record``."""
    known = ", ".join(repr(column) for column in record.cells)
    return ValueError(f"{source} lacks the columns {', '.join(missing)}; those that it has are {known}.")


def parse_records(records: Iterable[Record], source: str, broken_rows: BrokenRows = "refuse") -> list[PromptRow]:
    """Check every record and make it a row.

    Args:
        records: Rows with the columns of the field.
        source: What errors and the log call the set.
        broken_rows: What comes of those that are no prompt.

    Raises:
        ValueError: A column is missing, a row is broken and ``broken_rows`` is ``refuse``, or there are no rows.
    """
    rows: list[PromptRow] = []
    faults: list[str] = []
    places: dict[int, str] = {}
    for record in records:
        if missing := [column for column in _REQUIRED if column not in record.cells]:
            raise missing_columns(source, missing, record)
        try:
            row = _parse(record)
            if row.case_number in places:
                raise ValueError(f"case_number {row.case_number} is that of {places[row.case_number]} too")
        except ValueError as fault:
            faults.append(f"{record.place}: {fault}")
        else:
            places[row.case_number] = record.place
            rows.append(row)
    if faults and broken_rows == "refuse":
        more = f" (and {len(faults) - _MOST_REPORTED} more)" if len(faults) > _MOST_REPORTED else ""
        raise ValueError(f"{source} has broken rows; correct {'; '.join(faults[:_MOST_REPORTED])}{more}.")
    if faults:
        total = len(rows) + len(faults)
        log.warning("%s: %d of %d rows are broken and left out: %s.", source, len(faults), total, "; ".join(faults))
    if not rows:
        raise ValueError(f"{source} has no prompts{', but broken rows' if faults else ' that could be taken'}.")
    return rows


@contextmanager
def csv_rows(path: Path, required: Sequence[str]) -> Iterator["csv.DictReader[str]"]:
    """Open a UTF-8 CSV file whose first line names its columns.

    Raises:
        ValueError: One of the ``required`` columns is missing, or the file turns out to be no such CSV file.
    """
    require_itself(path)
    # A byte-order mark is what spreadsheet programs put first.
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            reader = csv.DictReader(file, strict=True)
            missing = [column for column in required if column not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"{path} lacks the columns {', '.join(missing)}; its first line must name them.")
            yield reader
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(
                f"{path} is not a CSV file in UTF-8 (read up to line {reader.reader.line_num}): {error}."
            ) from error


def _parse(record: Record) -> PromptRow:
    """Make a record a row; a ValueError says what is wrong with it."""
    if record.fault:
        raise ValueError(record.fault)
    cells = record.cells
    prompt = cells["prompt"].strip()
    if not prompt:
        raise ValueError("the prompt is empty")
    return PromptRow(
        case_number=_integer(cells, "case_number", 0),
        prompt=prompt,
        seed=_integer(cells, "evaluation_seed", DEFAULT_SEED),
        guidance=_number(cells, "evaluation_guidance", DEFAULT_GUIDANCE),
        labels={column: text for column, text in cells.items() if column not in {*_REQUIRED, *_SETTINGS}},
    )


def _integer(cells: Mapping[str, str], column: str, default: int) -> int:
    text = cells.get(column, str(default))
    if not (text.strip().isascii() and text.strip().isdigit()):
        raise ValueError(f"{column} is {text!r}, not a whole number from 0")
    return int(text)


def _number(cells: Mapping[str, str], column: str, default: float) -> float:
    text = cells.get(column, str(default))
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{column} is {text!r}, not a number from 0")
    return number
