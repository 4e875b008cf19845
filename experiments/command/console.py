"""The console command ``eraselab``; what is slow to import waits until a command needs it."""

import logging
import sys

import typer

from experiments.command import (
    audit_command,
    calibrate_command,
    dashboard_command,
    draw_command,
    explain_command,
    export_command,
    judge_command,
    methods_command,
    paper_command,
    report_command,
    results_command,
    run_command,
    runs_command,
    store_command,
)
from experiments.command.errors import CommandError, one_sentence
from experiments.command.plugins import take_plugins

app = typer.Typer(
    name="eraselab",
    help="Erase a concept from a text-to-image model, attack the result, and measure what holds.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _topic in (
    run_command,
    runs_command,
    store_command,
    draw_command,
    export_command,
    judge_command,
    audit_command,
    results_command,
    report_command,
    dashboard_command,
    calibrate_command,
    explain_command,
    methods_command,
    paper_command,
):
    _topic.register(app)


def main() -> None:
    """Run the command; an error of the user's is one sentence and exit status 1."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    with one_sentence():
        try:
            app(take_plugins(sys.argv[1:]), standalone_mode=False)
        except typer.TyperException as error:
            raise CommandError(error.format_message()) from error
        except typer.Abort:
            raise KeyboardInterrupt from None


if __name__ == "__main__":
    main()
