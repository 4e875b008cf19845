"""What jobs made, found again by the hash of what made it: ``<root>/<stage>/<hash>/``.

A stage's key is plain data: the part of the config that matters to it and the hashes of what it stands on. Batch
sizes and paths are no part of a key. Every file is written under a temporary name and renamed, so a killed job
leaves nothing half-written, and a lock per folder makes two workers do the work once.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from diffusion.files import write_atomically
from diffusion.finite import require_finite_numbers

log = logging.getLogger(__name__)

SCHEMA_VERSION = 2
"""Part of every hash: raise it when the same config would no longer give the same artefacts."""


def content_hash(data: object) -> str:
    """16 hexadecimal digits of the SHA-256 of ``data`` as canonical JSON.

    >>> content_hash({"a": 1, "b": [2]}) == content_hash({"b": [2], "a": 1})
    True
    """
    return hashlib.sha256(canonical_json(data).encode()).hexdigest()[:16]


def canonical_json(data: object) -> str:
    """``data`` as JSON with sorted keys and no white space.

    Raises:
        NotFiniteError: A number in it is infinite or NaN, which is no JSON.
    """
    require_finite_numbers(data, "A result")
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def write_json(path: Path, data: object) -> None:
    """Write ``data`` as indented JSON, atomically.

    Raises:
        NotFiniteError: A number in it is infinite or NaN, which is no JSON.
    """
    require_finite_numbers(data, f"{path.name}, which was to be written,")
    write_atomically(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        ValueError: The file is no JSON; the message says what to do.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete its folder and run the same command again.") from error


class Store:
    """A folder of artefacts.

    Args:
        root: Where they lie; made when missing.

    Raises:
        OSError: ``root`` cannot be made or written to.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        probe = root / f".{os.getpid()}.probe"
        try:
            root.mkdir(parents=True, exist_ok=True)
            probe.touch()
        except OSError as error:
            raise OSError(f"store is {root}; it must be a folder that can be written to ({error.strerror}).") from error
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)

    def folder(self, stage: str, key: Mapping[str, object]) -> Path:
        """The folder of one artefact, made when missing; its ``config.json`` is ``key``."""
        folder = self.root / stage / content_hash({"schema": SCHEMA_VERSION, "stage": stage, **key})
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "config.json").exists():
            write_json(folder / "config.json", {"schema": SCHEMA_VERSION, "stage": stage, **key})
        return folder

    @contextmanager
    def locked(self, folder: Path) -> Iterator[None]:
        """Hold ``folder`` alone; the operating system frees it when the process dies."""
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("waiting for another process that works in %s", folder)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def remembered(self, stage: str, key: Mapping[str, object], compute: Callable[[], Any]) -> Any:
        """The JSON value that ``compute`` returned the first time that ``stage`` met ``key``."""
        folder = self.folder(stage, key)
        with self.locked(folder):
            path = folder / "result.json"
            if not path.exists():
                write_json(path, compute())
            return read_json(path)


class Journal:
    """A file of one JSON object per line that survives a kill: a torn last line does not count.

    Args:
        path: The file; made when missing. One process at a time may append to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._whole = False

    def read(self) -> list[dict[str, Any]]:
        """Every whole line, in the order of writing."""
        if not self.path.exists():
            return []
        try:
            return [json.loads(line) for line in _whole_lines(self.path.read_bytes()).splitlines()]
        except ValueError as error:
            raise ValueError(
                f"{self.path} is damaged ({error}); delete its folder and run the same command again."
            ) from error

    def append(self, entry: Mapping[str, object]) -> None:
        """Add a line and wait until the disk has it."""
        self._drop_torn_line()
        with self.path.open("ab") as file:
            file.write(canonical_json(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _drop_torn_line(self) -> None:
        if not self._whole and self.path.exists():
            content = self.path.read_bytes()
            if len(whole := _whole_lines(content)) < len(content):
                write_atomically(self.path, whole)
        self._whole = True


def _whole_lines(content: bytes) -> bytes:
    return content[: content.rfind(b"\n") + 1]
