"""``eraselab judge``: pictures that were made elsewhere."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from experiments.command.results_command import RESULTS, Folder, print_paths


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(judge)


def judge(
    pictures: Annotated[Path, typer.Argument(help="A folder of pictures, or a CSV file with file,prompt,seed.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="As for run: concept=church judge=canvas.")] = None,
    folder: Folder = RESULTS,
    *,
    reference: Annotated[
        Path | None, typer.Option(help="The same prompts by the unedited model, likewise; measures need them.")
    ] = None,
) -> None:
    """Judge pictures that were made elsewhere, and measure them against those of the unedited model."""
    from rich.table import Table  # noqa: PLC0415

    from diffusion.text_files import csv_text, visible  # noqa: PLC0415
    from experiments.command.composing import compose_job  # noqa: PLC0415
    from experiments.command.config import make_object  # noqa: PLC0415
    from experiments.instruments.foreign_pictures import judge_pictures, list_pictures  # noqa: PLC0415
    from experiments.job.origin import code_state  # noqa: PLC0415
    from experiments.job.store import write_json  # noqa: PLC0415
    from experiments.results.screen import measure_text, open_console  # noqa: PLC0415

    config, choices = compose_job(overrides or [])
    listed = list_pictures(pictures)
    others = None if reference is None else list_pictures(reference)
    concept = make_object(config, "concept")
    evaluators = make_object(config, "evaluator") if others is not None else {}
    judged_by = choices.get("judge") or str(config.judge._target_).rpartition(".")[2]
    found = judge_pictures(listed, make_object(config, "judge"), evaluators, others)

    table = Table(title=visible(f"{len(listed)} pictures in {pictures}, judge {judged_by}"), title_justify="left")
    table.add_column("")
    table.add_column("value")
    table.add_row(visible(f"{concept.name} shown"), str(found.rate))
    for label, counts in sorted(found.labels.items()):
        table.add_row(f"pictures with {label}", str(counts["pictures"]))
    for name, value in found.measures.items():
        table.add_row(name.replace("_", " "), measure_text(value))
    open_console().print(table)

    name = f"judged_{judged_by}_{concept.name}_{pictures.stem or 'pictures'}"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        (picture.file, picture.row.prompt, picture.row.seed, int(there), f"{score:.6g}")
        for picture, there, score in zip(listed, found.present, found.scores, strict=True)
    ]
    paths = [folder / f"{name}.csv", folder / f"{name}.json"]
    paths[0].write_text(csv_text(["file", "prompt", "seed", "present", "score"], [[str(c) for c in r] for r in rows]))
    told = {key: value for key, value in asdict(found).items() if key not in {"present", "scores"}}
    write_json(
        paths[1],
        {"pictures": str(pictures), "judge": judged_by, "concept": concept.name, **told, **code_state()},
    )
    print_paths(paths)
