"""Files that are whole or not there."""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

log = logging.getLogger(__name__)


@contextmanager
def replacing(path: Path, *, flush: bool = True) -> Iterator[Path]:
    """Yield a temporary path of the same suffix; what was written there becomes ``path`` when the block ends well.

    Args:
        path: What is replaced.
        flush: Wait until the disk has it, so that a power cut leaves the old file or the new one, and no empty one.
    """
    partial = path.with_name(f".{path.stem}.{os.getpid()}.{threading.get_ident()}.partial{path.suffix}")
    try:
        yield partial
        if flush:
            _flush(partial)
        partial.replace(path)
        if flush:
            # Not every file system lets folders be flushed.
            with suppress(OSError):
                _flush(path.parent)
    finally:
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
