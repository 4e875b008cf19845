"""``eraselab export``: a run's erased model for other tools and people."""

from pathlib import Path
from typing import Annotated

import typer

from experiments.command.errors import CommandError
from experiments.command.options import ARTIFACTS, Run, StoreFolder
from experiments.command.results_command import RESULTS, print_paths


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(export)


def export(
    folder: Annotated[Path, typer.Argument(help="A new folder for diffusers, or a new file NAME.safetensors.")],
    run: Run,
    *,
    store: StoreFolder = ARTIFACTS,
    calibrations: Annotated[Path, typer.Option(help="Where eraselab calibrate wrote the judge's errors.")] = RESULTS,
    names: Annotated[
        str, typer.Option(help="Of the tensors in a file: diffusers, or compvis for the whole model as WebUIs read it.")
    ] = "diffusers",
) -> None:
    """Write a run's erased model as a folder of diffusers or as one file, with a model card and the hashes."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CommandError(f"{folder} exists and is not empty; choose another place to export to.")
    if names not in {"diffusers", "compvis"}:
        raise CommandError(f"names is {names!r}; it must be diffusers or compvis.")
    if names == "compvis" and folder.suffix != ".safetensors":
        raise CommandError(f"names is compvis, and {folder} would be a folder; name a file that ends in .safetensors.")
    if folder.suffix in {".ckpt", ".pt", ".bin"}:
        raise CommandError(f"{folder} would be a pickle; name a folder, or a file that ends in .safetensors.")

    from experiments.command.stored_runs import load_run  # noqa: PLC0415
    from experiments.job.store import read_json  # noqa: PLC0415
    from experiments.job.summary import read_summaries  # noqa: PLC0415
    from experiments.results.export import Names, export_run  # noqa: PLC0415

    layout: Names = "compvis" if names == "compvis" else "diffusers"
    loaded = load_run(run, store)
    summary = loaded.summary
    others = [
        other
        for other in read_summaries(store)
        if other["edit"]["hash"] == summary["edit"]["hash"] != "none"
        and other["run"] != summary["run"]
        and other["concept"] == summary["concept"]
    ]
    measured = calibrations / f"judge_{summary['choices'].get('judge')}_{summary['concept']}.json"
    calibration = read_json(measured) if measured.is_file() else None
    print_paths(export_run(loaded.model, loaded.edit, summary, others, folder, calibration, layout))
