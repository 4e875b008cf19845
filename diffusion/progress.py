"""Progress of long work: a bar with rate and time left on a terminal, silence elsewhere."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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

Item = TypeVar("Item")


class Bar:
    """One line of progress: ``advance`` moves it, ``note`` shows a short status beside it."""

    def __init__(self, progress: Progress, task: int) -> None:
        self._progress = progress
        self._task = task

    def advance(self, steps: int = 1) -> None:
        """Move the bar by ``steps``."""
        self._progress.advance(self._task, steps)  # type: ignore[arg-type]

    def note(self, text: str) -> None:
        """Show ``text`` at the end of the line."""
        self._progress.update(self._task, note=text)  # type: ignore[arg-type]


@contextmanager
def progress_bar(label: str, total: int, *, done: int = 0) -> Iterator[Bar]:
    """Show a bar of ``total`` steps, of which ``done`` were done before; nothing is drawn off a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(show_speed=True),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty(), transient=True) as progress:
        yield Bar(progress, progress.add_task(label, total=total, completed=done, note=""))


def track(items: Iterable[Item], label: str, total: int) -> Iterator[Item]:
    """Yield ``items`` and show how far they have come."""
    with progress_bar(label, total) as bar:
        for item in items:
            yield item
            bar.advance()
