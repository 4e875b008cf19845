"""Where prompts come from, and how their table is read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Protocol, runtime_checkable

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from evaluation.prompt_sets import BrokenRows, PromptRow, Record, csv_records, parse_records


@runtime_checkable
class Source(Protocol):
    """A table of prompts, wherever it lies."""

    def records(self) -> Iterator[Record]:
        """Read the rows in their order."""

    def __str__(self) -> str:
        """What errors and the log call it."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PromptFile:
    """A local CSV file.

    Attributes:
        path: The file.
        setting: Which field of the config errors tell to correct.
    """

    path: Path | None
    setting: str = "prompt_set.source.path"

    def records(self) -> Iterator[Record]:
        """Read the rows in their order.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no CSV file in UTF-8.
        """
        if self.path is None or not self.path.is_file():
            raise FileNotFoundError(
                f"{self.setting} is {self.path}; it must be a CSV file with the columns case_number,prompt."
            )
        return csv_records(self.path)

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, config=ConfigDict(extra="forbid", arbitrary_types_allowed=True))
class PromptSet:
    """The prompts of a source.

    Attributes:
        source: Where they come from.
        broken_rows: What comes of rows that are no prompt: the set is refused, or they are left out.
        limit: How many rows are taken, from the first; all if none.
    """

    source: Source
    broken_rows: BrokenRows = "refuse"
    limit: Annotated[int, Field(ge=1)] | None = None

    def read(self) -> list[PromptRow]:
        """Fetch the source if need be, and read it.

        Raises:
            FileNotFoundError: The source is not there.
            ValueError: A column is missing, a row is broken, or there are no rows.
        """
        return parse_records(self.source.records(), str(self.source), self.broken_rows)[: self.limit]
