"""What goes wrong when a file is written, told with its path: a full disk, a read-only folder, a limit."""

import errno
import os
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PROBE = 1 << 16
"""Bytes that are appended to a file to see what the disk says."""

_LIBRARIES = re.compile(
    r"PytorchStreamWriter|inline_container|iostream error|Error while serializing|when writing image file"
)
"""How the errors of libraries read that could not write a file: PyTorch's, safetensors' and Pillow's."""

_NUMBER = re.compile(r"os error (\d+)")


@contextmanager
def writing(path: Path, partial: Path | None = None) -> Iterator[None]:
    """Let whatever keeps the block from writing ``path`` be an OSError that names it.

    Pillow, PyTorch and safetensors say "No space left on device" without a file, or less.

    Args:
        path: The file, as the user knows it.
        partial: What it is called while it is written.

    Raises:
        OSError: With number, reason and path.
    """
    own = {None, str(path), str(partial)}
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            number = error.errno if error.filename in own else None
        else:
            number = _number(str(error), partial or path)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _number(message: str, written: Path) -> int | None:
    """The operating system's number for why a library could not write; None for an error of another kind."""
    if not _LIBRARIES.search(message):
        return None
    if found := _NUMBER.search(message):
        return int(found[1])
    probe = written / ".probe" if written.is_dir() else written
    try:
        with probe.open("ab") as file:
            file.write(bytes(_PROBE))
    except OSError as told:
        return told.errno
    return errno.EIO


def room_left(path: Path) -> str:
    """How much of the disk that holds ``path`` is free, as in ``0.3 of 1.0 MB free``; empty if that cannot be said."""
    for folder in (path, *path.absolute().parents):
        with suppress(OSError):
            usage = shutil.disk_usage(folder)
            return f"{_size(usage.free)} of {_size(usage.total)} free"
    return ""


def size_limit() -> str:
    """The size that files of this process may have (``ulimit -f``), as in ``at most 100 kB``; empty without a limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return "" if limit == resource.RLIM_INFINITY else f"at most {_size(limit)} (ulimit -f)"


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
