"""Where prompts come from, and how their table is read."""

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Protocol, runtime_checkable
from urllib.parse import urlsplit

import pooch
from pydantic import AfterValidator, Field, model_validator

from diffusion.checked import checked
from diffusion.files import in_short, shipped, why_unreadable
from diffusion.sources import hub_answers
from evaluation.prompt_sets import (
    DEFAULT_GUIDANCE,
    DEFAULT_SEED,
    LARGEST_SEED,
    SETTINGS,
    BrokenRows,
    PromptRow,
    Record,
    csv_records,
    line_records,
    parse_records,
)

log = logging.getLogger(__name__)

_ANSWER_SECONDS = 10.0
_LINES = ".txt"

TEMPLATE = "template"
"""The column of prompts with a place ``{}`` for a phrase."""


@runtime_checkable
class Source(Protocol):
    """A table of prompts, wherever it lies."""

    def records(self) -> Iterator[Record]:
        """Fetch the table if need be and read its rows, in their order."""

    def __str__(self) -> str:
        """What errors and the log call it."""


@checked
class PromptFile:
    """A local file: CSV, or ``.txt`` with one prompt per line, which makes the column ``prompt``.

    Attributes:
        path: The file.
        setting: Which field of the config errors tell to correct.
    """

    path: Annotated[Path, AfterValidator(shipped)] | None
    setting: str = "path"

    def records(self) -> Iterator[Record]:
        """Read the rows in their order.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no CSV file, or not in UTF-8.
        """
        if self.path is None or not self.path.is_file():
            raise FileNotFoundError(
                f"{self.setting} is {self.path}; it must be a CSV file with the columns case_number,prompt."
            )
        return _file_records(self.path)

    def __str__(self) -> str:
        return str(self.path)


@checked
class Download:
    """A file on the web, of the kinds of :class:`PromptFile`, that is fetched once.

    Attributes:
        url: Its address, best one that never changes.
        sha256: What its content must hash to.
        cache: Folder that keeps it; the user's cache folder if none.
    """

    url: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    cache: Path | None = None

    @property
    def place(self) -> Path:
        """Where the file is kept; one that was put there by hand is as good."""
        folder = self.cache or Path(pooch.os_cache("robust-concept-erasing"))
        return folder.expanduser().absolute() / f"{self.sha256[:12]}-{PurePosixPath(urlsplit(self.url).path).name}"

    def records(self) -> Iterator[Record]:
        """Fetch the file unless it is there, and read its rows in their order.

        Raises:
            FileNotFoundError: It cannot be fetched, or what comes has another hash.
            ValueError: It is no CSV file, or not in UTF-8.
        """
        return _file_records(self._fetch())

    def __str__(self) -> str:
        return self.url

    def _fetch(self) -> Path:
        place = self.place
        replaced = place.is_file() and pooch.file_hash(str(place)) != self.sha256
        if not place.is_file():
            log.info("fetching %s", self.url)
        # Its own lines on the screen would say the same.
        pooch.get_logger().setLevel(logging.WARNING)
        try:
            fetched = pooch.retrieve(
                self.url,
                known_hash=f"sha256:{self.sha256}",
                fname=place.name,
                path=place.parent,
                downloader=pooch.HTTPDownloader(timeout=_ANSWER_SECONDS),
            )
        except (OSError, ValueError) as error:
            reason = _why_not_fetched(error)
            if replaced:
                reason += ", and what lies in its place has another SHA-256"
            raise FileNotFoundError(
                f"{self.url} cannot be used: {reason}; download it where that works and put it at {place} "
                f"(SHA-256 {self.sha256})."
            ) from error
        return Path(fetched)


@checked
class HubDataset:
    """A data set of the Hugging Face Hub, or a local copy of it.

    Attributes:
        name: Its id, ``owner/name``.
        split: Which split.
        revision: A commit, tag or branch; the main branch if none.
        copy: A local copy that is read instead: a folder, or a .csv, .json, .jsonl or .parquet file.
        options: Further arguments of ``datasets.load_dataset`` for its file format, such as ``keep_default_na``.
        setting: Which field of the config errors tell to point to a copy.
    """

    name: str
    split: str = "train"
    revision: str | None = None
    copy: Path | None = None
    options: Mapping[str, Any] = Field(default_factory=dict)
    setting: str = "prompt_set.source.copy"

    def records(self) -> Iterator[Record]:
        """Fetch the data set unless the cache has it, and read its rows, which are counted from 0.

        Columns of other things than texts and numbers, such as pictures, are left out.

        Raises:
            FileNotFoundError: There is no copy at ``copy``, or the Hub cannot be asked.
            ValueError: The copy is no such data set.
        """
        from datasets import Value, disable_progress_bars  # noqa: PLC0415 - takes seconds to import

        # They are drawn off a terminal too.
        disable_progress_bars()
        table = self._load() if self.copy is None else self._load_copy(self.copy.expanduser())
        columns = [name for name, feature in table.features.items() if isinstance(feature, Value)]
        for number, row in enumerate(table.select_columns(columns)):
            yield Record(f"row {number}", {column: _text(value) for column, value in row.items()})

    def __str__(self) -> str:
        return str(self.copy or self.name)

    def _load(self) -> Any:
        from datasets import config, load_dataset  # noqa: PLC0415
        from huggingface_hub import constants  # noqa: PLC0415

        reason = f"{constants.ENDPOINT} cannot be reached"
        known = {library: library.HF_HUB_OFFLINE for library in (config, constants)}
        # Without an answer the libraries would ask again and again; offline they look into their cache at once.
        answers = hub_answers()
        try:
            for library in known:
                library.HF_HUB_OFFLINE = not answers
            return load_dataset(self.name, split=self.split, revision=self.revision, **self.options)
        except Exception as error:  # whatever its readers raise
            if answers:
                reason = in_short(error)
            raise FileNotFoundError(
                f"The data set {self.name!r} cannot be had from the Hub or its cache: {reason}; download it where that "
                f"works (`hf download --repo-type dataset {self.name} --local-dir FOLDER`, after `hf auth login` if "
                f"it is gated) and set {self.setting}=FOLDER."
            ) from error
        finally:
            for library, offline in known.items():
                library.HF_HUB_OFFLINE = offline

    def _load_copy(self, copy: Path) -> Any:
        from datasets import load_dataset  # noqa: PLC0415

        if not copy.exists():
            raise FileNotFoundError(f"{self.setting} is {copy}, which is neither a folder nor a file.")
        formats = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
        if copy.is_file() and copy.suffix not in formats:
            raise ValueError(f"{self.setting} is {copy}; a file must end in {', '.join(formats)}.")
        try:
            if copy.is_file():
                return load_dataset(formats[copy.suffix], data_files=str(copy), split=self.split, **self.options)
            return load_dataset(str(copy), split=self.split, **self.options)
        except Exception as error:  # whatever its readers raise
            raise ValueError(
                f"{copy} is no data set with a split {self.split!r}: {why_unreadable(copy, error)}."
            ) from error


_NUMBER_TESTS = ("above", "below")
_TEXT_TESTS = ("contains", "has_item")


@checked
class Condition:
    """What a cell of a row must be for the row to be taken.

    Attributes:
        column: The column, as the source calls it.
        test: ``equals`` (as a number if ``value`` is one), ``contains`` (as a part of the text), ``has_item`` (as one
            of the items between commas; spaces count), ``above`` or ``below``.
        value: What the cell is compared with.
    """

    column: str
    test: Literal["equals", "contains", "has_item", "above", "below"]
    value: float | str

    @model_validator(mode="after")
    def _fits(self) -> "Condition":
        wanted = str if self.test in _TEXT_TESTS else float if self.test in _NUMBER_TESTS else object
        if not isinstance(self.value, wanted):
            kind = "a text" if wanted is str else "a number"
            raise ValueError(f"value is {self.value!r}; for {self.test} it must be {kind}.")
        return self

    def holds(self, cells: Mapping[str, str]) -> bool:
        """Say whether a row with these cells is taken.

        Raises:
            ValueError: The cell should be a number and is none.
        """
        text = cells[self.column]
        if isinstance(self.value, str):
            match self.test:
                case "contains":
                    return self.value in text
                case "has_item":
                    return self.value in text.split(",")
                case _:
                    return text == self.value
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if math.isnan(number):
            raise ValueError(f"{self.column} is {text!r}, not a number")
        return {"above": number > self.value, "below": number < self.value}.get(self.test, number == self.value)


@checked
class Columns:
    """What a source calls the columns of the field.

    Attributes:
        case_number: None numbers the rows by their place in the source, from 0.
        prompt: The text.
        evaluation_seed: None leaves every row to the set's ``seed``; so does a source without such a column. The name
            of the field stands for those of other files too, see :data:`evaluation.prompt_sets.SETTINGS`.
        evaluation_guidance: The same with ``guidance``.
    """

    case_number: str | None = "case_number"
    prompt: str = "prompt"
    evaluation_seed: str | None = "evaluation_seed"
    evaluation_guidance: str | None = "evaluation_guidance"

    @property
    def needed(self) -> list[str]:
        """Those that the source must have; settings need no column of their own unless they are called otherwise."""
        settings = {"evaluation_seed": self.evaluation_seed, "evaluation_guidance": self.evaluation_guidance}
        renamed = [column for name, column in settings.items() if column != name]
        return [column for column in (self.case_number, self.prompt, *renamed) if column is not None]


@checked(arbitrary_types_allowed=True)
class PromptSet:
    """The prompts of a source.

    Attributes:
        source: Where they come from.
        columns: What the source calls them.
        seed: Of rows without one of their own.
        guidance: Guidance scale of rows without one of their own.
        phrase: What stands at ``{}`` in a source whose prompts are called ``template``, so that concepts of one kind
            can share a file. In a source of prompts ``{}`` is a text like any other.
        where: Conditions that every row must meet; those that do not are passed over.
        other_sizes: What comes of rows that ask for a picture of another width or height than the model's: the job is
            refused before it begins, or their pictures have the model's size, which the log and the summary tell.
        broken_rows: What comes of the others where they are no prompt: the set is refused, or they are left out.
        limit: How many rows are taken, from the first; all if none.
    """

    source: Source
    columns: Columns = Columns()
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] = DEFAULT_SEED
    guidance: Annotated[float, Field(ge=0)] = DEFAULT_GUIDANCE
    phrase: str | None = None
    where: tuple[Condition, ...] = ()
    other_sizes: Literal["refuse", "draw"] = "refuse"
    broken_rows: BrokenRows = "refuse"
    limit: Annotated[int, Field(ge=1)] | None = None

    def read(self) -> list[PromptRow]:
        """Fetch the source if need be, and read it.

        Raises:
            FileNotFoundError: The source is not there.
            ValueError: A column is missing, a row is broken, or there are no rows.
        """
        return parse_records(self._records(), str(self.source), self.broken_rows)[: self.limit]

    def _records(self) -> Iterator[Record]:
        """The rows that meet the conditions, with the columns of the field."""
        needed = [*self.columns.needed, *(condition.column for condition in self.where)]
        for number, source_record in enumerate(self.source.records()):
            record = self._filled(source_record)
            record.require(needed, str(self.source))
            try:
                if not (record.fault or all(condition.holds(record.cells) for condition in self.where)):
                    continue
                fault = record.fault
            except ValueError as error:
                fault = str(error)
            yield replace(record, cells=self._named(record.cells, number), fault=fault)

    def _named(self, cells: Mapping[str, str], number: int) -> dict[str, str]:
        names = vars(self.columns)
        taken = {*names, *names.values()}
        row = {column: text for column, text in cells.items() if column not in taken}
        row |= {name: cells[column] for name, column in names.items() if column in cells}
        if self.columns.case_number is None:
            row["case_number"] = str(number)
        for name, default in (("evaluation_seed", self.seed), ("evaluation_guidance", self.guidance)):
            # The other files' names of a setting stand for it unless the set has a name of its own, or none.
            if name not in row and (names[name] != name or row.keys().isdisjoint(SETTINGS[name])):
                row[name] = str(default)
        return row

    def _filled(self, record: Record) -> Record:
        """The record with a prompt in the place of its template, if it has one and there is a phrase for it."""
        if self.phrase is None or TEMPLATE not in record.cells or self.columns.prompt in record.cells:
            return record
        cells = dict(record.cells)
        return replace(record, cells=cells | {self.columns.prompt: cells.pop(TEMPLATE).replace("{}", self.phrase)})


def _file_records(path: Path) -> Iterator[Record]:
    return line_records(path) if path.suffix == _LINES else csv_records(path)


def _why_not_fetched(error: OSError | ValueError) -> str:
    if (response := getattr(error, "response", None)) is not None:
        return f"the server answers {response.status_code} {response.reason}"
    if isinstance(error, ValueError):
        return "what the server sends has another SHA-256" if "hash" in str(error) else in_short(error)
    return error.strerror or "the server cannot be reached"


def _text(value: Any) -> str:
    if value is None:
        return ""
    # A column of whole numbers with gaps comes as fractions.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
