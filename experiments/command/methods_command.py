"""``eraselab new`` and ``eraselab check``: methods of your own."""

import time
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add both commands."""
    app.command("new")(new)
    app.command("check")(check)


def new(
    kind: Annotated[str, typer.Argument(help="eraser, pruning, attack or judge.")],
    name: Annotated[str, typer.Argument(help="What commands will call it, as in eraser=NAME.")],
    *,
    into: Annotated[
        Path | None, typer.Option(help="A folder of your own, a plugin; without it, this repository.")
    ] = None,
) -> None:
    """Write code, YAML file and test of a new method that runs as it stands, to be filled with yours."""
    from experiments.command.methods.writing import write_method  # noqa: PLC0415

    for path in write_method(kind, name, into):
        print(path)
    plugins = f" plugins={into}" if into is not None else ""
    print(f"Now: eraselab check {kind}={name}{plugins}")
    print(f"     eraselab run {kind}={name}{plugins}")


def check(
    method: Annotated[str, typer.Argument(help="The name of an eraser, pruning, attack or judge, or eraser=NAME.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Further fields, as eraser.steps=3.")] = None,
) -> None:
    """Try a method on a tiny model, and say in one sentence what its protocol wants where it is wrong."""
    from experiments.command.methods.checking import check_method  # noqa: PLC0415

    started = time.monotonic()
    for sentence in check_method(method, *overrides or []):
        print(f"ok  {sentence}", flush=True)
    print(f"Nothing to complain of, in {time.monotonic() - started:.0f} s.")
