"""Locks that machines share through object storage, and that end with whoever holds them.

A lock is a folder of objects called 1, 2, ... of which the highest counts; each can be created once only. Its holder
writes it anew every few seconds. Who waits creates the next one when it was left unwritten for too long, or at once
where its process was on the same machine and is gone. Clocks need not agree.
"""

import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

from diffusion.leases import LEASE_SECONDS, Busy

log = logging.getLogger(__name__)

_FEWEST_SECONDS = 0.1
_MOST_SECONDS = 2.0
"""Between two looks at a lock that somebody else holds; they grow."""


@contextmanager
def holding_object(files: Any, folder: str, *, wait: bool = True, seconds: float = LEASE_SECONDS) -> Iterator[None]:
    """Hold the lock at ``folder`` while the block runs.

    Args:
        files: An fsspec file system. Where it cannot create an object only if there is none, two that come in the same
            moment may both hold the lock.
        folder: Of the lock alone, in its terms.
        wait: Wait for another process that holds it.
        seconds: How long a lock may be left unwritten; the same for all who want it. It is written three times as
            often.

    Raises:
        Busy: Another process holds it, and ``wait`` is false.
        OSError: The storage cannot be reached or written to.
    """
    lease = _Lease(files, folder)
    lease.acquire(seconds, wait=wait)
    ended = Event()
    writer = Thread(target=lease.keep, args=(ended, seconds), daemon=True)
    writer.start()
    try:
        yield
    finally:
        ended.set()
        writer.join()
        lease.release()


class _Lease:
    def __init__(self, files: Any, folder: str) -> None:
        self._files, self._folder = files, folder
        self._holder = secrets.token_hex(8)
        self._beats = 0
        self._number = 0

    def acquire(self, seconds: float, *, wait: bool) -> None:
        """Hold it."""
        seen, since, pause = self._look(), time.monotonic(), _FEWEST_SECONDS
        told = False
        while True:
            free = not seen or _is_of_a_dead_process(seen[max(seen)]) or time.monotonic() - since > seconds
            if free and self._claim(max(seen, default=0) + 1, seen):
                return
            if not (free or wait):
                raise Busy(f"{self._folder} is held by another process.")
            if not (free or told):
                told = True
                log.info("waiting for another machine that works in %s", self._folder)
            time.sleep(pause)
            pause = min(1.5 * pause, _MOST_SECONDS, seconds / 10)
            if (found := self._look()) != seen:
                seen, since = found, time.monotonic()

    def keep(self, ended: Event, seconds: float) -> None:
        """Write it every few seconds until ``ended``; stop with a warning where another process took it over."""
        while not ended.wait(seconds / 3):
            try:
                found = self._look()
                if max(found, default=0) != self._number or self._holder.encode() not in found[self._number]:
                    # Files are replaced as a whole and follow from what made them: the work is done twice, no more.
                    log.warning("the lock %s was lost: another process may do this work too", self._folder)
                    return
                self._beats += 1
                self._files.pipe_file(self._path(self._number), self._content())
            except Exception as error:
                log.warning("the lock %s could not be renewed: %s", self._folder, error)

    def release(self) -> None:
        """Give it up, the lower ones first: the highest counts."""
        try:
            for number in self._numbers():
                if number <= self._number:
                    with suppress(FileNotFoundError):
                        self._files.rm_file(self._path(number))
        except Exception as error:
            log.warning("the lock %s could not be released, and is free some time later: %s", self._folder, error)

    def _claim(self, number: int, before: Mapping[int, bytes]) -> bool:
        """Create the next one; whether it counts, as nobody has done the like in the same moment."""
        self._number = number
        try:
            self._files.pipe_file(self._path(number), self._content(), mode="create")
        except FileExistsError:
            return False
        # Somebody may have released and taken the lock between the look and the claim: then theirs counts.
        if all(other == number or before.get(other) == content for other, content in self._look().items()):
            return True
        with suppress(FileNotFoundError):
            self._files.rm_file(self._path(number))
        return False

    def _look(self) -> dict[int, bytes]:
        """What every object of the lock says; nothing where nobody holds it."""
        read = {number: self._read(number) for number in self._numbers()}
        return {number: content for number, content in read.items() if content is not None}

    def _numbers(self) -> list[int]:
        try:
            names = self._files.ls(self._folder, detail=False)
        except FileNotFoundError:
            return []
        ends = (name.rstrip("/").rpartition("/")[2] for name in names)
        return sorted(int(end) for end in ends if end.isdigit())

    def _read(self, number: int) -> bytes | None:
        try:
            content: bytes = self._files.cat_file(self._path(number))
        except FileNotFoundError:
            return None
        return content

    def _path(self, number: int) -> str:
        return f"{self._folder}/{number}"

    def _content(self) -> bytes:
        facts = {"machine": this_machine(), "pid": os.getpid(), "holder": self._holder, "beats": self._beats}
        return json.dumps(facts).encode()


def this_machine() -> str:
    """A name under which process numbers mean the same: that of the host, its start and the container, if it is one.

    Machines of a cloud may all have one host name.
    """
    name = socket.gethostname()
    with suppress(OSError):
        name += f" {Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return name


def _is_of_a_dead_process(content: bytes) -> bool:
    """Whether its holder was on this machine, and is gone."""
    try:
        facts = json.loads(content)
        machine, pid = facts["machine"], int(facts["pid"])
    except (ValueError, KeyError, TypeError):
        return False
    if machine != this_machine():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
