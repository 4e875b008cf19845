"""``eraselab store``: what is there, how large, what no run needs, what is damaged."""

from collections import Counter
from typing import Annotated

import typer

from experiments.command.errors import CommandError
from experiments.command.options import ARTIFACTS, StoreFolder

_DAY = 24.0


def register(app: typer.Typer) -> None:
    """Add the commands."""
    store_app = typer.Typer(help="Look at the store of artefacts, and clean it.", no_args_is_help=True)
    store_app.command("ls")(list_stages)
    store_app.command("du")(sizes_of_runs)
    store_app.command("gc")(collect_garbage)
    store_app.command("repair")(repair)
    app.add_typer(store_app, name="store")


def list_stages(
    stage: Annotated[str | None, typer.Argument(help="Its artefacts one by one; all stages without.")] = None,
    *,
    store: StoreFolder = ARTIFACTS,
) -> None:
    """List the stages with their counts and sizes, or the artefacts of one."""
    from experiments.command.errors import unknown  # noqa: PLC0415
    from experiments.job.housekeeping import artefacts  # noqa: PLC0415
    from experiments.job.remote_store import address_of  # noqa: PLC0415
    from experiments.results.screen import open_console, plain_table, size_text  # noqa: PLC0415

    found = artefacts(store)
    stages = sorted({artefact.stage for artefact in found})
    if stage is not None and stage not in stages:
        raise CommandError(unknown(stage, stages, what="is no stage of the store; it has"))
    if stage is None:
        rows = []
        for name in stages:
            of_stage = [artefact for artefact in found if artefact.stage == name]
            files, size = sum(len(a.files) for a in of_stage), sum(a.size for a in of_stage)
            rows.append([name, f"{len(of_stage):,}", f"{files:,}", size_text(size)])
        total = sum(artefact.size for artefact in found)
        rows.append(["all", f"{len(found):,}", f"{sum(len(a.files) for a in found):,}", size_text(total)])
        table = plain_table(["stage", "artefacts", "files", "size"], rows, f"The store {address_of(store)}")
    else:
        of_stage = sorted((a for a in found if a.stage == stage), key=lambda artefact: artefact.hours)
        rows = [[a.folder.name, f"{len(a.files):,}", size_text(a.size), f"{a.hours:,.1f}"] for a in of_stage]
        table = plain_table(
            [stage, "files", "size", "hours old"], rows, f"{stage} in {address_of(store)}, the newest first"
        )
    open_console().print(table)


def sizes_of_runs(*, store: StoreFolder = ARTIFACTS) -> None:
    """Show how much of the store each run stands on, and how much of that no other run needs."""
    from experiments.job.housekeeping import artefacts, needs  # noqa: PLC0415
    from experiments.job.remote_store import address_of  # noqa: PLC0415
    from experiments.results.screen import open_console, plain_table, size_text  # noqa: PLC0415

    sizes = {artefact.name: artefact.size for artefact in artefacts(store)}
    needed = needs(store)
    times = Counter(name for names in needed.values() for name in names)
    rows = []
    for run, names in sorted(needed.items(), key=lambda item: -sum(sizes.get(name, 0) for name in item[1])):
        own = sum(sizes.get(name, 0) for name in names if times[name] == 1)
        rows.append([run, size_text(sum(sizes.get(name, 0) for name in names)), size_text(own)])
    table = plain_table(["run", "stands on", "its alone"], rows, f"Runs in {address_of(store)}, the largest first")
    open_console().print(table)
    print(f"{size_text(sum(sizes.values()))} in all; `eraselab store gc` lists what no run needs.")


def collect_garbage(
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Delete it.")] = False,
    spare: Annotated[float, typer.Option(min=0, help="Hours since the last change within which nothing goes.")] = _DAY,
    store: StoreFolder = ARTIFACTS,
) -> None:
    """List what no run's summary needs, and delete it with --yes.

    Runs themselves stay: to have less, delete folders in runs/ first.
    """
    from experiments.job.housekeeping import artefacts, delete, needs, unneeded  # noqa: PLC0415
    from experiments.results.screen import size_text  # noqa: PLC0415

    found = artefacts(store)
    needed = frozenset[str]().union(*needs(store).values())
    lost = unneeded(found, needed, spare)
    for artefact in lost:
        print(f"{artefact.folder}  {size_text(artefact.size)}")
    freed = size_text(sum(artefact.size for artefact in lost))
    if not yes:
        todo = f"; --yes deletes them, {freed}" if lost else ""
        print(f"{len(lost)} of {len(found)} artefacts are needed by no run and {spare:g} hours old{todo}.")
        return
    kept = [artefact for artefact in lost if not delete(artefact)]
    for artefact in kept:
        print(f"{artefact.folder} stays: a process works in it.")
    freed = size_text(sum(artefact.size for artefact in lost) - sum(artefact.size for artefact in kept))
    print(f"{len(lost) - len(kept)} artefacts deleted, {freed} freed.")


def repair(*, store: StoreFolder = ARTIFACTS) -> None:
    """Read every artefact; damaged ones are set aside, and made again when their job is run again."""
    from experiments.job.housekeeping import artefacts, set_damaged_aside  # noqa: PLC0415
    from experiments.job.remote_store import open_store  # noqa: PLC0415

    artefacts(store)
    count, damaged = 0, 0
    for artefact, aside in set_damaged_aside(open_store(store)):
        count += 1
        damaged += bool(aside)
        for name in aside:
            print(artefact.folder / name)
    if damaged:
        print(f"{damaged} of {count} artefacts were damaged; run their commands again, and they are made again.")
    else:
        print(f"{count} artefacts read; none is damaged.")
