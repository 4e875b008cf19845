"""``eraselab dashboard``: a workspace and a report of W&B over the runs that were recorded there."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments.command.errors import CommandError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(dashboard)


def dashboard(
    tables: Annotated[
        list[Path] | None, typer.Argument(help="Markdown files, as eraselab tables writes; they become a report.")
    ] = None,
    *,
    project: Annotated[
        str | None, typer.Option(help="Of the runs; else what wandb is set to, or the tracker's.")
    ] = None,
    entity: Annotated[
        str | None, typer.Option(help="Team or user; else what wandb is set to, or the key's own.")
    ] = None,
    concept: Annotated[str | None, typer.Option(help="Show runs of this concept alone.")] = None,
    name: Annotated[str, typer.Option(help="Title of the workspace and of the report.")] = "Robust concept erasing",
    spec: Annotated[
        Path | None, typer.Option(help="Write what would be sent into this JSON file, and send nothing.")
    ] = None,
) -> None:
    """Make a W&B workspace of charts over eraser, pruning and attack; from tables, a report too."""
    if find_spec("wandb_workspaces") is None:
        raise CommandError(
            "dashboard needs wandb-workspaces, which is not here; pip install 'robust-concept-erasing[dashboard]'."
        )
    missing = [path for path in tables or [] if not path.is_file()]
    if missing:
        raise CommandError(f"There is no table {missing[0]}; `eraselab tables` writes some.")

    import wandb  # noqa: PLC0415

    from experiments.results.dashboard import make_report, make_workspace  # noqa: PLC0415
    from experiments.results.tracking import WandbTracker  # noqa: PLC0415
    from experiments.results.wandb_process import has_key  # noqa: PLC0415

    told = wandb.setup().settings
    project = project or told.project or WandbTracker().project
    entity = entity or told.entity
    if spec is None:
        if not has_key(wandb):
            raise CommandError(
                "W&B has no key here; `wandb login` keeps one, and --spec FILE writes the dashboard without sending it."
            )
        entity = entity or wandb.Api().default_entity
    workspace = make_workspace(entity or "", project, name, concept)
    read = [(path.stem, path.read_text(encoding="utf-8")) for path in tables or []]
    report = make_report(entity or "", project, name, read, concept) if read else None
    made: dict[str, Any] = {"workspace": workspace, **({"report": report} if report is not None else {})}
    if spec is not None:
        specs = {
            kind: json.loads(each._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
            for kind, each in made.items()
        }
        spec.write_text(json.dumps(specs, indent=2) + "\n", encoding="utf-8")
        print(spec)
        return
    for kind, each in made.items():
        try:
            each.save()
        except Exception as error:  # third-party code and the network may fail in any way
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CommandError(f"W&B did not take the {kind} of {entity}/{project}: {reason}") from error
        print(each.url)
