"""``eraselab report`` and ``eraselab leaderboard``."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments.command.errors import CommandError
from experiments.job.result import RUNS
from experiments.job.store import read_json, unchecked
from experiments.job.summary import read_summaries
from experiments.results.report.leaderboard import write_leaderboard
from experiments.results.report.page import write_report

SUMMARY = "summary.json"

StoreFolder = Annotated[Path, typer.Option(help="The store of the runs.")]
PagesFolder = Annotated[Path, typer.Option(help="Where the page goes.")]


def report(
    runs: Annotated[list[str], typer.Argument(help="Names of runs, their folders, or summary.json files.")],
    store: StoreFolder = Path("artifacts"),
    folder: PagesFolder = Path("results"),
) -> None:
    """Write a page to look at: of one run, or of several side by side."""
    print(write_report(find_runs(runs, store), folder))


def leaderboard(
    store: StoreFolder = Path("artifacts"),
    folder: PagesFolder = Path("results"),
    records: Annotated[
        Path | None, typer.Option(help="JSON records, contributed ones too; results/leaderboard if not given.")
    ] = None,
) -> None:
    """Write a record a method and concept from all runs in the store, and the page over all records."""
    if not store.is_dir() and not (records and records.is_dir()):
        raise CommandError(f"store is {store}; there is no such folder.")
    print(write_leaderboard(read_summaries(store), records or folder / "leaderboard", folder))


def register(app: typer.Typer) -> None:
    """Add both commands."""
    app.command()(report)
    app.command()(leaderboard)


def find_runs(names: Sequence[str], store: Path) -> list[dict[str, Any]]:
    """The summaries that ``names`` stand for, each once, with their ``path``.

    Args:
        names: Names of runs in ``store``; or summary.json files, folders with one, or folders of such folders.
        store: Where runs are looked up by name.

    Raises:
        CommandError: There is no such run.
        ValueError: A summary is damaged.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        for path in _summaries(name, store):
            summary = read_json(path)
            if not isinstance(summary, dict) or not {"run", "rates", "cases", "config"} <= summary.keys():
                raise CommandError(f"{path} is no summary of a run; give a run's summary.json or its folder.")
            # Those of older versions have no checksum.
            if "checksum" in summary:
                try:
                    summary = unchecked(summary)
                except ValueError as error:
                    raise CommandError(f"{path} is damaged: {error}; repeat the run's command.") from error
            found.setdefault(summary["run"], {**summary, "path": str(path)})
    return list(found.values())


def _summaries(name: str, store: Path) -> list[Path]:
    if (path := store / RUNS / name / SUMMARY).is_file():
        return [path]
    given = Path(name)
    if given.is_file():
        return [given]
    if given.is_dir():
        inside = [given / SUMMARY] if (given / SUMMARY).is_file() else sorted(given.glob(f"*/{SUMMARY}"), key=_order)
        if inside:
            return inside
        raise CommandError(f"The folder {given} has no {SUMMARY}; give a run's folder, or that of a sweep.")
    known = [path.parent.name for path in (store / RUNS).glob(f"*/{SUMMARY}")]
    if not known:
        raise CommandError(f"{name} is no file or folder, and the store {store} has no runs.")
    nearest = get_close_matches(name, known, n=3) or sorted(known)[:3]
    raise CommandError(f"{name} is no file, no folder and no run in {store}; did you mean {', '.join(nearest)}?")


def _order(path: Path) -> tuple[int, str]:
    """Jobs of a sweep by their numbers."""
    name = path.parent.name
    return (int(name) if name.isdigit() else 0, name)
