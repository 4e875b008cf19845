"""``eraselab paper`` and ``settings``: the paper's benchmark, and what methods take here and on Stable Diffusion."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from experiments.command.results_command import RESULTS, Folder, print_paths


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(paper)
    app.command()(settings)


def paper(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="As for run; paper.scale=smoke for all in small.")
    ] = None,
    folder: Folder = RESULTS,
    *,
    evaluations_per_second: Annotated[float | None, typer.Option(help="Of your GPU, for the hours.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Run the plan if nothing is missing.")] = False,
) -> None:
    """Run the paper's benchmark: say what is missing, print the plan, and the table beside published numbers."""
    from experiments.command import paper as benchmark  # noqa: PLC0415

    typed, smoke = benchmark.scale_of(overrides or [])
    jobs = benchmark.cells(typed, smoke=smoke)
    configs = benchmark.composed(jobs)
    missing = benchmark.missing_files(configs)
    if missing:
        print(benchmark.listed(missing))
    if not smoke:
        speed = benchmark.EVALUATIONS_PER_SECOND if evaluations_per_second is None else evaluations_per_second
        plan = benchmark.plan(jobs, configs, speed)
        print(plan.to_markdown(index=False))
        rate = f"{speed:g} U-Net evaluations a second"
        print(f"{len(jobs)} jobs, about {plan['hours'].sum():,.0f} hours on one GPU at {rate}.")
    if missing:
        sys.exit("Nothing was run: files are missing, as listed above.")
    if not (smoke or yes):
        sys.exit("Nothing was run; --yes runs it.")
    table = benchmark.results(jobs, benchmark.run_cells(jobs, Path("outputs") / "paper"))
    print(table.to_markdown(index=False))
    print_paths([benchmark.write_results(table, folder, smoke=smoke)])


def settings(
    choice: Annotated[str | None, typer.Argument(help="One method, as eraser=esd; all of them without.")] = None,
) -> None:
    """Print what every eraser, pruning and attack takes on the canvas and on Stable Diffusion, side by side."""
    from experiments.command.side_by_side import side_by_side  # noqa: PLC0415

    for name, table in side_by_side(choice):
        print(f"\n## {name}\n")
        print(table.to_markdown(index=False, disable_numparse=True))
