"""``eraselab run``, which is ``python run.py`` from any folder."""

import sys
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    # Hydra reads every flag, --help too.
    app.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})(run)


def run(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="In Hydra's grammar: eraser=esd pruning=on, -m for sweeps, --help for all choices."),
    ] = None,
) -> None:
    """Run a job or a sweep, as python run.py does."""
    from experiments.command.run import command_line  # noqa: PLC0415

    sys.argv[1:] = overrides or []
    command_line()
