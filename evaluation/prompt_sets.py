"""Prompt sets: CSV files in the format of the field, one prompt per row with its seed and guidance scale."""

import csv
import logging
import math
import re
from collections import Counter
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

LARGEST_SEED = 2**64 - 1
"""What a random number generator takes."""

SETTINGS: dict[str, tuple[str, ...]] = {
    "evaluation_seed": ("evaluation_seed", "seed", "sd_seed"),
    "evaluation_guidance": ("evaluation_guidance", "guidance_scale", "sd_guidance_scale", "guidance"),
    "width": ("width", "sd_image_width", "image_width"),
    "height": ("height", "sd_image_height", "image_height"),
}
"""Settings of a picture, and the columns of published files that hold them, the first of which counts."""

_REQUIRED = ("case_number", "prompt")
_KNOWN = {*_REQUIRED, *(column for columns in SETTINGS.values() for column in columns)}
_LIKE_A_SETTING = re.compile(r"seed|guidance|cfg|width|height|resolution|steps|sampler|scheduler|negative_?prompt")
_WHOLE = re.compile(r"(\d+)(?:\.0*)?", re.ASCII)
"""A whole number, also as tables with gaps write it."""

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
        width: Of its picture in pixels; the model's own if None.
        height: The same.
    """

    case_number: int
    prompt: str
    seed: int = DEFAULT_SEED
    guidance: float = DEFAULT_GUIDANCE
    labels: Mapping[str, str] = field(default_factory=dict)
    width: int | None = None
    height: int | None = None


@dataclass(frozen=True)
class Record:
    """One row as its source has it.

    Attributes:
        place: Where it lies there, as in ``line 3``.
        cells: Text by column.
        fault: What is wrong with the row as such, if anything.
        repeated: Names that several columns of the source have; none of them is among the cells.
    """

    place: str
    cells: Mapping[str, str]
    fault: str = ""
    repeated: frozenset[str] = frozenset()

    def require(self, columns: Iterable[str], source: str) -> None:
        """Refuse a source that lacks one of the ``columns``, or has several of that name.

        Raises:
            ValueError: It does; ``source`` is what the error calls it.
        """
        columns = list(dict.fromkeys(columns))
        if repeated := [column for column in columns if column in self.repeated]:
            raise _repeated(source, repeated)
        if missing := [column for column in columns if column not in self.cells]:
            known = ", ".join(repr(column) for column in self.cells)
            raise ValueError(f"{source} lacks the columns {', '.join(missing)}; those that it has are {known}.")


BrokenRows = Literal["refuse", "skip"]
"""What comes of broken rows: the whole set is refused, which never changes how many prompts there are, or they are
left out and the log says which."""


def read_prompt_set(path: Path, limit: int | None = None) -> list[PromptRow]:
    """Read the prompts of a UTF-8 CSV file in the order of its rows.

    The columns ``case_number`` and ``prompt`` must be there, those of :data:`SETTINGS` may be; their order is free, and
    what else the file has becomes labels.

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
        repeated = frozenset(column for column, count in Counter(columns).items() if count > 1)
        first_line = reader.line_num + 1
        # The rows below DictReader's own, which would not tell where a row of several lines begins.
        for cells in reader.reader:
            last_line = reader.reader.line_num
            if cells:
                lines = f"line {last_line}" if first_line == last_line else f"lines {first_line}-{last_line}"
                fault = "" if len(cells) == len(columns) else "it has more or fewer cells than there are columns"
                pairs = zip_longest(columns, cells[: len(columns)], fillvalue="")
                yield Record(lines, {name: text for name, text in pairs if name not in repeated}, fault, repeated)
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
    columns: dict[str, None] = {}
    for record in records:
        record.require((*_REQUIRED, *(record.repeated & _KNOWN)), source)
        columns |= dict.fromkeys(record.cells)
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
    if unused := [column for column in columns if column not in _KNOWN and _LIKE_A_SETTING.search(column.lower())]:
        log.warning(
            "%s: the columns %s look like settings of pictures, and no picture depends on them; settings are read from "
            "%s.",
            source,
            ", ".join(map(repr, unused)),
            ", ".join(sorted(_KNOWN - {*_REQUIRED})),
        )
    if not rows:
        raise ValueError(f"{source} has no prompts{', but broken rows' if faults else ' that could be taken'}.")
    return rows


@contextmanager
def csv_rows(path: Path, required: Sequence[str]) -> Iterator["csv.DictReader[str]"]:
    """Open a UTF-8 CSV file whose first line names its columns.

    Raises:
        ValueError: One of the ``required`` columns is missing or there twice, or the file is no such CSV file.
    """
    require_itself(path)
    # A byte-order mark is what spreadsheet programs put first.
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            reader = csv.DictReader(file, strict=True)
            missing = [column for column in required if column not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"{path} lacks the columns {', '.join(missing)}; its first line must name them.")
            if repeated := [column for column in required if (reader.fieldnames or ()).count(column) > 1]:
                raise _repeated(str(path), repeated)
            yield reader
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(
                f"{path} is not a CSV file in UTF-8 (read up to line {reader.reader.line_num}): {error}."
            ) from error


def _repeated(source: str, columns: Sequence[str]) -> ValueError:
    return ValueError(
        f"{source} has several columns called {', '.join(columns)}, which leaves open what is meant; "
        "rename all but one."
    )


def _parse(record: Record) -> PromptRow:
    """Make a record a row; a ValueError says what is wrong with it."""
    if record.fault:
        raise ValueError(record.fault)
    cells = record.cells
    prompt = cells["prompt"].strip()
    if not prompt:
        raise ValueError("the prompt is empty")
    seed, guidance, width, height = (_setting(cells, columns) for columns in SETTINGS.values())
    return PromptRow(
        case_number=_integer("case_number", cells["case_number"]),
        prompt=prompt,
        seed=_integer(*seed, most=LARGEST_SEED) if seed else DEFAULT_SEED,
        guidance=_number(*guidance) if guidance else DEFAULT_GUIDANCE,
        labels={column: text for column, text in cells.items() if column not in _KNOWN},
        # Tables of many files leave them empty where a row does not say.
        width=_integer(*width, least=1) if width and width[1].strip() else None,
        height=_integer(*height, least=1) if height and height[1].strip() else None,
    )


def _setting(cells: Mapping[str, str], columns: Sequence[str]) -> tuple[str, str] | None:
    """Find the column that has a setting, and its text; None if no column has it.

    Raises:
        ValueError: Several do, the first of ``columns`` is not among them, and they disagree.
    """
    found = [(column, cells[column]) for column in columns if column in cells]
    if found and found[0][0] != columns[0] and len({_as_number(text) for _, text in found}) > 1:
        told = " and ".join(f"{column} is {text!r}" for column, text in found)
        raise ValueError(f"{told}; call the right one {columns[0]}")
    return found[0] if found else None


def _as_number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text.strip()


def _integer(column: str, text: str, *, least: int = 0, most: int | None = None) -> int:
    whole = _WHOLE.fullmatch(text.strip())
    if whole is None or int(whole[1]) < least:
        raise ValueError(f"{column} is {text!r}, not a whole number from {least}")
    if most is not None and int(whole[1]) > most:
        raise ValueError(f"{column} is {text!r}, more than {most}")
    return int(whole[1])


def _number(column: str, text: str) -> float:
    number = _as_number(text)
    if isinstance(number, str) or not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{column} is {text!r}, not a number from 0")
    return number
