"""Progress of long work: a bar with rate and time left on a terminal, a line of the log every half minute elsewhere."""

import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

log = logging.getLogger(__name__)

SECONDS_BETWEEN_REPORTS = 30.0

Item = TypeVar("Item")

_in_lines = False
"""Whether a terminal too is told in lines."""


class Bar:
    """One line of progress: ``advance`` moves it, ``note`` shows a short status beside it."""

    def __init__(self, progress: Progress, label: str, total: int, done: int) -> None:
        self._progress = progress
        self._task = progress.add_task(label, total=total, completed=done, note="")
        self._label, self._total, self._done, self._first = label, total, done, done
        self._note = ""
        self._started = time.monotonic()

    def advance(self, steps: int = 1) -> None:
        """Move the bar by ``steps``."""
        self._done += steps
        self._progress.advance(self._task, steps)

    def note(self, text: str) -> None:
        """Show ``text`` at the end of the line."""
        self._note = text
        self._progress.update(self._task, note=text)

    def line(self) -> str:
        """What is done, how far it is and how long it will take yet, in words."""
        seconds, moved = time.monotonic() - self._started, self._done - self._first
        left = timedelta(seconds=round(seconds / max(moved, 1) * (self._total - self._done)))
        parts = [f"{self._label}: {self._done} of {self._total}", f"about {left} left" if moved else "", self._note]
        return ", ".join(filter(None, parts))


def report_in_lines() -> None:
    """Draw no bars from now on, as where several processes share a terminal."""
    global _in_lines  # noqa: PLW0603 - a property of the process, as its terminal is
    _in_lines = True


@contextmanager
def progress_bar(label: str, total: int, *, done: int = 0) -> Iterator[Bar]:
    """Show how far ``total`` steps have come, of which ``done`` were done before."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(show_speed=True),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    terminal = sys.stderr.isatty() and not _in_lines
    with Progress(*columns, console=Console(stderr=True), disable=not terminal, transient=True) as progress:
        bar = Bar(progress, label, total, done)
        if terminal:
            yield bar
            return
        with _reported(bar):
            yield bar


@contextmanager
def _reported(bar: Bar) -> Iterator[None]:
    """Log a line about ``bar`` twice a minute, also while one of its steps takes longer than that."""
    ended = threading.Event()

    def report() -> None:
        while not ended.wait(SECONDS_BETWEEN_REPORTS):
            log.info("%s", bar.line())

    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        yield
    finally:
        ended.set()
        reporter.join()


def track(items: Iterable[Item], label: str, total: int) -> Iterator[Item]:
    """Yield ``items`` and show how far they have come."""
    with progress_bar(label, total) as bar:
        for item in items:
            yield item
            bar.advance()
