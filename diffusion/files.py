"""Files that are whole or not there, and files that are not what they are called."""

import logging
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from diffusion.disk import writing

log = logging.getLogger(__name__)

_STAND_INS = (
    (
        rb"version https://git-lfs\.github\.com/spec/",
        "a pointer of Git LFS and not the file itself; run `git lfs pull` where it was cloned, or download the file",
    ),
    (
        rb"(\.\./)*(\.git|)/annex/objects/",
        "a pointer of git-annex and not the file itself; run `git annex get` where it was cloned",
    ),
    (
        rb"(<!--.*?-->\s*)?(<!doctype html|<html|<head|<script)",
        "a web page that was saved in the file's place; download the file itself, by its direct link",
    ),
    (
        rb"(<\?xml[^>]*>\s*)?<error\b|\{\s*\"(error|message)\"\s*:\s*\"|(repository|entry) not found|"
        rb"invalid username or password|access to (model|dataset) \S+ is restricted",
        "a server's error message that was saved in the file's place; log in if it says so, and download it again",
    ),
)
"""How files begin that stand in the place of others, and what they are."""

_PAGES = frozenset({".html", ".htm", ".md", ".py"})
"""Suffixes of files that may well be pages."""

_START = 512
"""Bytes of a file that tell what it is."""


_HERE = Path(__file__).resolve().parent

_SHIPPED = _HERE if (_HERE / "prompts").is_dir() else _HERE.parent
"""The folder that holds ``prompts``: an installed package itself, or the checkout."""


def shipped(path: Path) -> Path:
    """``path``; or the project's own file of that name, where a relative path leads nowhere from the working folder.

    So configs may name ``prompts/canvas/church.csv`` wherever a command is typed.
    """
    own = _SHIPPED / path
    return own if not path.exists() and own.exists() else path


def stands_in(path: Path) -> str:
    """What a file is in place of what its name says, with the remedy; of a folder, the first of its files that is one.

    Returns:
        The rest of a sentence that begins with the path; empty if there is nothing of the kind.
    """
    if path.is_dir():
        files = (file for file in sorted(path.rglob("*")) if file.is_file() and file.suffix.lower() not in _PAGES)
        faults = ((file, stands_in(file)) for file in files)
        return next((f"holds {file.relative_to(path)}, which {fault}" for file, fault in faults if fault), "")
    try:
        with path.open("rb") as file:
            start = file.read(_START).removeprefix(b"\xef\xbb\xbf").lstrip()
    except OSError:
        return ""
    return next(
        (f"is {what}" for beginning, what in _STAND_INS if re.match(beginning, start, re.IGNORECASE | re.DOTALL)), ""
    )


def require_itself(path: Path) -> None:
    """See to it that a file is no pointer, web page or error message in the place of another.

    Raises:
        ValueError: It is.
    """
    if fault := stands_in(path):
        raise ValueError(f"{path} {fault}.")


def why_unreadable(path: Path, error: BaseException) -> str:
    """Why a file or folder cannot be read, to follow its path and a colon: what stands in its place, or the error."""
    return f"it {fault}" if (fault := stands_in(path)) else in_short(error)


def in_short(error: BaseException) -> str:
    """The first line of an error's message, without its last full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__


@contextmanager
def replacing(path: Path, *, flush: bool = True) -> Iterator[Path]:
    """Yield a temporary path of the same suffix; what was written there becomes ``path`` when the block ends well.

    Args:
        path: What is replaced.
        flush: Wait until the disk has it, so that a power cut leaves the old file or the new one, and no empty one.

    Raises:
        OSError: With reason and path, whatever the library that writes says.
    """
    # Machines that share a folder may have processes of one number.
    partial = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.partial{path.suffix}")
    try:
        with writing(path, partial):
            yield partial
            if flush:
                _flush(partial)
            partial.replace(path)
        if flush:
            # Not every file system lets folders be flushed.
            with suppress(OSError):
                _flush(path.parent)
    finally:
        # On a read-only disk it is not there, and cannot be removed either.
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write ``content`` under a temporary name in the same folder, then rename it to ``path``."""
    with replacing(path) as partial:
        partial.write_bytes(content if isinstance(content, bytes) else content.encode())


def set_aside(path: Path, why: object) -> None:
    """Rename a damaged file, so that it is made again and can still be looked at; the log says so in one line."""
    free = (path.with_name(f"{path.name}.damaged-{number}") for number in count(1))
    aside = next(name for name in free if not name.exists())
    path.replace(aside)
    log.warning("%s is damaged (%s): it is now called %s, and made again", path, why, aside.name)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
