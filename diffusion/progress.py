"""Progress of long work: a bar with rate and time left on a terminal, a line of the log every half minute elsewhere."""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
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

Listener = Callable[[str, int, float], None]
"""Hears of a bar's label, how many of its steps are done, and the number that it shows."""

_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("listeners", default=())

_in_lines = False
"""Whether a terminal too is told in lines."""

_shown: list["Bar"] = []
"""The bars of work that is going on, the innermost last."""


class Bar:
    """One line of progress: ``advance`` moves it, ``note`` shows a short status beside it."""

    def __init__(self, progress: Progress, label: str, total: int, done: int) -> None:
        self._progress = progress
        self._task = progress.add_task(label, total=total, completed=done, note="")
        self._label, self._total, self._done, self._first = label, total, done, done
        self._note, self._inside, self._begun = "", "", 0.0
        self._started = time.monotonic()

    def advance(self, steps: int = 1) -> None:
        """Move the bar by ``steps``."""
        self._done += steps
        self._show()

    def note(self, text: str, number: float | None = None) -> None:
        """Show ``text`` at the end of the line, and tell ``number`` to those who listen; see :func:`overheard`."""
        self._note = text
        self._show()
        if number is not None:
            for listener in _listeners.get():
                listener(self._label, self._done, number)

    def look_inside(self, text: str, begun: float) -> None:
        """Say how far the steps in hand have come, in words and as a number of whole steps."""
        self._inside, self._begun = text, begun
        self._show()

    def _show(self) -> None:
        told = ", ".join(filter(None, [self._inside, self._note]))
        self._progress.update(self._task, completed=self._done + self._begun, note=told)

    def line(self) -> str:
        """What is done, how far it is and how long it will take yet, in words."""
        seconds, moved = time.monotonic() - self._started, self._done + self._begun - self._first
        left = timedelta(seconds=round(seconds / moved * (self._total - self._done - self._begun)) if moved else 0)
        how_far = f"{self._label}: {self._done} of {self._total}"
        parts = [how_far, self._inside, f"about {left} left" if moved else "", self._note]
        return ", ".join(filter(None, parts))


def report_in_lines() -> None:
    """Draw no bars from now on, as where several processes share a terminal."""
    global _in_lines  # noqa: PLW0603 - a property of the process, as its terminal is
    _in_lines = True


@contextmanager
def overheard(listener: Listener) -> Iterator[None]:
    """Let ``listener`` hear of the numbers of all bars, as they are shown, for the length of the context."""
    before = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(before)


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
        _shown.append(bar)
        try:
            with nullcontext() if terminal else _reported(bar):
                yield bar
        finally:
            _shown.remove(bar)


def look_inside(text: str, begun: float) -> None:
    """Say on the innermost bar, if there is one, how far its steps in hand have come; see :meth:`Bar.look_inside`."""
    if _shown:
        _shown[-1].look_inside(text, begun)


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
