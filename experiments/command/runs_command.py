"""``eraselab runs``: what the store has, and two runs side by side."""

from typing import Annotated

import typer

from experiments.command.errors import CommandError
from experiments.command.options import ARTIFACTS, StoreFolder


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(runs)


def runs(
    filters: Annotated[
        list[str] | None, typer.Argument(help="Choices or fields: eraser=esd,ac concept=church eraser.steps=200.")
    ] = None,
    *,
    compare: Annotated[tuple[str, str] | None, typer.Option(help="Two runs, side by side.")] = None,
    sort: Annotated[str, typer.Option(help="date, base, erased, attacked, or a field as eraser.steps.")] = "date",
    limit: Annotated[int | None, typer.Option(min=1, help="How many are shown, from the first.")] = None,
    store: StoreFolder = ARTIFACTS,
) -> None:
    """List the runs of the store, the newest first, or compare two."""
    if not store.is_dir():
        raise CommandError(f"store is {store}, which is no folder; name the folder of the runs with --store.")
    wanted = [_parsed(told) for told in filters or []]

    from experiments.command.stored_runs import run_named  # noqa: PLC0415
    from experiments.job.remote_store import address_of  # noqa: PLC0415
    from experiments.job.summary import read_summaries  # noqa: PLC0415
    from experiments.results.listing import compared, fitting, listed, sorted_by  # noqa: PLC0415
    from experiments.results.screen import open_console  # noqa: PLC0415

    console = open_console()
    if compare is not None:
        if wanted or limit:
            raise CommandError("--compare takes two runs and no filters; leave the others out.")
        for part in compared(*(run_named(name, store) for name in compare)):
            console.print(part, soft_wrap=isinstance(part, str))
        return
    every = read_summaries(store)
    shown = sorted_by(fitting(every, wanted), sort)
    console.print(listed(shown[:limit], f"{len(shown[:limit])} of {len(every)} runs in {address_of(store)}"))


def _parsed(told: str) -> tuple[str, list[str]]:
    field, equals, values = told.partition("=")
    if not (field and equals and values):
        raise CommandError(f"{told!r} is no filter; write field=value, as in eraser=esd or concept=church.")
    return field, values.split(",")
