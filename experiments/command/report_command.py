"""``eraselab report`` and ``eraselab leaderboard``."""

from pathlib import Path
from typing import Annotated

import typer

from experiments.command.errors import CommandError
from experiments.command.options import ARTIFACTS, StoreFolder

PagesFolder = Annotated[Path, typer.Option(help="Where the page goes.")]


def report(
    runs: Annotated[list[str], typer.Argument(help="Names of runs, their folders, or summary.json files.")],
    store: StoreFolder = ARTIFACTS,
    folder: PagesFolder = Path("results"),
) -> None:
    """Write a page to look at: of one run, or of several side by side."""
    from experiments.command.stored_runs import find_runs  # noqa: PLC0415
    from experiments.results.report.page import write_report  # noqa: PLC0415

    print(write_report(find_runs(runs, store), folder))


def leaderboard(
    store: StoreFolder = ARTIFACTS,
    folder: PagesFolder = Path("results"),
    records: Annotated[
        Path | None, typer.Option(help="JSON records, contributed ones too; results/leaderboard if not given.")
    ] = None,
) -> None:
    """Write a record a method and concept from all runs in the store, and the page over all records."""
    if not store.is_dir() and not (records and records.is_dir()):
        raise CommandError(f"store is {store}; there is no such folder.")

    from experiments.job.summary import read_summaries  # noqa: PLC0415
    from experiments.results.report.leaderboard import write_leaderboard  # noqa: PLC0415

    print(write_leaderboard(read_summaries(store), records or folder / "leaderboard", folder))


def register(app: typer.Typer) -> None:
    """Add both commands."""
    app.command()(report)
    app.command()(leaderboard)
