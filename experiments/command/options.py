"""Options that several commands have; imports nothing heavy."""

from pathlib import Path
from typing import Annotated

import typer

from experiments.command.errors import CommandError


def _store_folder(told: str) -> Path:
    """A store as it is typed: a folder, or an address of which this machine has a copy."""
    if "://" not in str(told):
        return Path(told)
    from experiments.job.remote import place_of  # noqa: PLC0415
    from experiments.job.remote_store import local_copy  # noqa: PLC0415

    try:
        return local_copy(place_of(told))
    except ValueError as error:
        raise CommandError(f"store: {error}") from error


StoreFolder = Annotated[
    Path,
    typer.Option(
        help="The folder of all runs and what they made, or s3://BUCKET/PREFIX.",
        parser=_store_folder,
        metavar="FOLDER",
    ),
]
ARTIFACTS = Path("artifacts")
Run = Annotated[str, typer.Option(help="Name of a run, or how it begins; see eraselab runs.")]
