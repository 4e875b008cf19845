"""``eraselab audit``: a fixed battery of attacks on somebody's erased model."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from experiments.command.errors import CommandError
from experiments.command.options import ARTIFACTS, StoreFolder

BATTERY = ("paraphrase", "random", "unlearndiff", "p4d", "ringabell", "embedding", "relearn")
"""From those that know nothing of the model to those that train it."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(audit)


def audit(
    model: Annotated[str, typer.Argument(help="An erased model: a checkpoint, or a folder of diffusers.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="As for run: model=sd14 prompts=50.")] = None,
    *,
    concept: Annotated[str, typer.Option(help="What was erased.")],
    require: Annotated[
        list[str] | None, typer.Option(help="Bounds that every attack must keep, as 'attacked.high<0.2'.")
    ] = None,
    attacks: Annotated[str, typer.Option(help="Which attacks, with commas between.")] = ",".join(BATTERY),
    alone: Annotated[
        bool, typer.Option("--alone", help="There is no base model to compare with: the model is loaded as it is.")
    ] = False,
    folder: Annotated[Path, typer.Option(help="Where the report and each job's own files go.")] = Path("outputs/audit"),
    store: StoreFolder = ARTIFACTS,
) -> None:
    """Attack somebody's erased model in seven ways, write the report, and say by the exit status if it holds."""
    names = [name.strip() for name in attacks.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise CommandError(f"attacks is {attacks!r}; name each attack once, with commas between.")
    if not (alone or Path(model).expanduser().exists()):
        raise CommandError(f"There is no checkpoint at {model}; a model of the Hub is audited with --alone.")

    from experiments.command.audit import run_audit  # noqa: PLC0415
    from experiments.job.remote_store import address_of  # noqa: PLC0415
    from experiments.results.requirements import Requirement  # noqa: PLC0415
    from experiments.results.screen import show_sweep  # noqa: PLC0415

    requirements = [Requirement.parse(text) for text in require or []]
    summaries = run_audit(
        model, concept, names, [f"store={address_of(store)}", *(overrides or [])], folder, as_base=alone
    )
    show_sweep(summaries, [])
    broken = [(each.text, failures) for each in requirements if (failures := each.failures(summaries))]
    for text, failures in broken:
        print(f"{text} does not hold: {', '.join(failures)}.", file=sys.stderr)
    if broken:
        sys.exit(1)
    if requirements:
        print(f"Every attack keeps {', '.join(each.text for each in requirements)}.")
