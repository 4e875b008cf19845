"""``eraselab calibrate``: how often a judge errs."""

from pathlib import Path
from typing import Annotated

import typer

from experiments.command.results_command import RESULTS, Folder, print_paths


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(calibrate)


def calibrate(
    overrides: Annotated[list[str] | None, typer.Argument(help="As for run: judge=nudenet concept=church.")] = None,
    folder: Folder = RESULTS,
    *,
    pictures: Annotated[
        Path | None, typer.Option(help="Folder with present/ and absent/, or CSV file,present; else they are drawn.")
    ] = None,
    drawn: Annotated[int, typer.Option(min=2, help="How many pictures the canvas draws.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the drawing; the canvas was trained with seed 0.")] = 1000,
) -> None:
    """Measure how often a judge errs."""
    from experiments.command import calibrate as calibration  # noqa: PLC0415

    result = calibration.run(overrides or [], pictures, drawn, seed)
    print(calibration.markdown(result))
    print_paths(calibration.write_calibration(result, folder))
