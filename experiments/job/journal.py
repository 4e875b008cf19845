"""Outcomes on the disk as soon as they are known, one JSON object per line."""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusion.disk import writing
from diffusion.files import set_aside, write_atomically
from experiments.job.store import canonical_json, checked, unchecked

log = logging.getLogger(__name__)


class Journal:
    """A file of one JSON object per line that survives a kill: a torn last line does not count.

    Every line carries its checksum, and one that does not fit it counts as little.

    Args:
        path: The file; made when missing. One process at a time may append to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._whole = False

    def read(self) -> list[dict[str, Any]]:
        """Every sound line, in the order of writing."""
        return [entry for _, _, entry in self._lines() if entry is not None]

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add a line and wait until the disk has it."""
        self._drop_torn_line()
        with writing(self.path), self.path.open("ab") as file:
            file.write(canonical_json(checked(entry)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def mend(self, keep: Callable[[Mapping[str, Any]], bool] = lambda _: True) -> None:
        """Drop damaged lines, with a word in the log, and entries that ``keep`` does not want.

        What the file was is kept beside it if a line was damaged.
        """
        lines = list(self._lines())
        damaged = [number for number, _, entry in lines if entry is None]
        kept = [line for _, line, entry in lines if entry is not None and keep(entry)]
        if len(kept) == len(lines):
            return
        if damaged:
            set_aside(self.path, f"line {', '.join(map(str, damaged))}; the other lines stay")
        write_atomically(self.path, b"".join(kept))

    def _lines(self) -> Iterator[tuple[int, bytes, dict[str, Any] | None]]:
        """Number, text and entry of every whole line; no entry where it is damaged."""
        if not self.path.exists():
            return
        for number, line in enumerate(_whole_lines(self.path.read_bytes()).split(b"\n")[:-1], start=1):
            try:
                yield number, line + b"\n", unchecked(json.loads(line))
            except ValueError:
                yield number, line + b"\n", None

    def _drop_torn_line(self) -> None:
        if not self._whole and self.path.exists():
            content = self.path.read_bytes()
            if len(whole := _whole_lines(content)) < len(content):
                write_atomically(self.path, whole)
        self._whole = True


def _whole_lines(content: bytes) -> bytes:
    return content[: content.rfind(b"\n") + 1]
