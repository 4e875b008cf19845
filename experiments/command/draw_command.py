"""``eraselab draw``: any prompt by the models of a run."""

from pathlib import Path
from typing import Annotated

import typer

from experiments.command.errors import CommandError
from experiments.command.options import ARTIFACTS, Run, StoreFolder


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(draw)


def draw(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    run: Run,
    seeds: Annotated[str, typer.Option(help="A picture each: 0,1,2 or 0-3.")] = "0-3",
    guidance: Annotated[float | None, typer.Option(min=0, help="By default that of the run's first prompt.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="By default those of the run.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="File of the sheet, by default draw-RUN.png.")] = None,
    *,
    store: StoreFolder = ARTIFACTS,
) -> None:
    """Draw a prompt by the base model, the erased one, and the erased one with its guard, as one labelled sheet."""
    numbers = read_seeds(seeds)
    if not prompt.strip():
        raise CommandError("The prompt is empty; say what to draw.")
    target = sheet or Path(f"draw-{run}.png")
    if target.suffix.lower() not in {".png", ".jpg", ".jpeg", ".webp"}:
        raise CommandError(f"sheet is {target}; its name must end in .png, .jpg or .webp.")

    from experiments.command.stored_runs import load_run  # noqa: PLC0415
    from experiments.job.drawing import draw_pictures  # noqa: PLC0415
    from experiments.results.screen import title  # noqa: PLC0415
    from experiments.results.sheet import draw_sheet  # noqa: PLC0415

    loaded = load_run(run, store)
    sampling = loaded.sampling(steps)
    scale = loaded.guidance() if guidance is None else guidance
    with loaded.threads():
        pictures = draw_pictures(loaded.model, loaded.edit, prompt, numbers, scale, sampling)
    told = f"{title(loaded.summary)}, run {loaded.summary['run']}, guidance {scale:g}, {sampling.steps} steps"
    target.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(prompt, numbers, pictures, told).save(target)
    print(target)


def read_seeds(text: str) -> list[int]:
    """Seeds as typed: numbers and ranges, with commas between.

    Raises:
        CommandError: They are something else, or more than 64.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not (_is_number(first) and (_is_number(last) or not dash)):
            raise CommandError(f"seeds is {text!r}; write whole numbers from 0, as in 0,1,2 or 0-3.")
        start, end = int(first), int(last) if dash else int(first)
        if not start <= end < start + 64:
            raise CommandError(f"seeds is {text!r}; a range goes up, and has 64 seeds at the most.")
        seeds += range(start, end + 1)
    return list(dict.fromkeys(seeds))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()
