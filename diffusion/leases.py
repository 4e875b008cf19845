"""Locks that several machines can share through a folder, and that end with whoever holds them.

A lock is a file that only one process can make. Its holder touches it every few seconds; who waits takes it over once
it is left untouched, or at once where its process was on the same machine and is gone. Clocks need not agree.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import LeaseCompromise, SoftFileLease, Timeout

log = logging.getLogger(__name__)

LEASE_SECONDS = 45.0
"""How long a lock may be left untouched before another machine takes it over; it is touched three times as often."""

_SECONDS_BETWEEN_TRIES = 0.2


class Busy(Exception):
    """Another process holds the lock."""


@contextmanager
def holding(path: Path, *, wait: bool = True, seconds: float = LEASE_SECONDS) -> Iterator[None]:
    """Hold the lock at ``path`` while the block runs.

    Put it into the folder that it guards: making it there shows a machine what others have written to that folder.

    Args:
        path: The lock's file, which is gone when nobody holds it.
        wait: Wait for another process that holds it.
        seconds: See :data:`LEASE_SECONDS`; the same for all who want this lock.

    Raises:
        Busy: Another process holds it, and ``wait`` is false.
        OSError: The file cannot be made.
    """
    lock = SoftFileLease(path, lease_duration=seconds, poll_interval=_SECONDS_BETWEEN_TRIES, on_compromise=_tell)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise Busy(f"{path} is held by another process.") from None
        log.info("waiting for another process that works in %s", path.parent)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _tell(loss: LeaseCompromise) -> None:
    # Files are replaced as a whole and follow from what made them, so the work is done twice and nothing is damaged.
    log.warning(
        "the lock %s was lost (%s), as when a machine sleeps: another process may do this work too",
        *(loss.lock_file, loss.reason.replace("-", " ")),
    )
