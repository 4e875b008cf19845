"""``eraselab tables``, ``figure``, ``claim``, ``neurons`` and ``probes``: runs as files to look at."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments.command.options import ARTIFACTS, StoreFolder

Experiment = Annotated[str, typer.Argument(help="A preset of conf/experiment.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="The overrides that its sweep was run with.")]
Folder = Annotated[Path, typer.Option(help="Where the files go.")]
RESULTS = Path("results")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (tables, figure, claim, neurons, probes):
        app.command()(command)


def tables(experiment: Experiment = "table1", overrides: Overrides = None, folder: Folder = RESULTS) -> None:
    """Collect an experiment's runs into tables."""
    from experiments.results.tables import write_tables  # noqa: PLC0415

    summaries, missing = _collected(experiment, overrides)
    print_paths(write_tables(summaries, _named(experiment, overrides), folder, missing=missing))


def figure(experiment: Experiment = "attacks", overrides: Overrides = None, folder: Folder = RESULTS) -> None:
    """Draw an experiment's attack success rates against their cost, or against what is retained."""
    from experiments.results.figures import write_figure  # noqa: PLC0415

    summaries, _ = _collected(experiment, overrides)
    print_paths(write_figure(summaries, _named(experiment, overrides), folder))


def claim(experiment: Experiment = "claim", overrides: Overrides = None, folder: Folder = RESULTS) -> None:
    """Compare pruned methods with their erasers alone, as the paper's claim asks."""
    from experiments.results.claim import write_claim  # noqa: PLC0415

    summaries, missing = _collected(experiment, overrides)
    print_paths([write_claim(summaries, _named(experiment, overrides), folder, missing=missing)])


def neurons(
    experiment: Experiment = "neurons",
    overrides: Overrides = None,
    folder: Folder = RESULTS,
    *,
    units: Annotated[str, typer.Option(help="What counts as a neuron: feed_forward or cross_attention.")] = "",
    spread: Annotated[str, typer.Option(help="What matched differences are divided by: paired or pooled.")] = "",
    percent: Annotated[float | None, typer.Option(help="How many neurons count as correlated.")] = None,
    seeds_per_pair: Annotated[int | None, typer.Option(help="Pictures of each pair of prompts.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of those pictures, the random neurons and the bootstrap.")] = None,
) -> None:
    """Look at the neurons that go with a concept: erased, and under attack."""
    from diffusion.allocator import keep_freed_memory  # noqa: PLC0415
    from experiments.command.stored_runs import job_of_summary  # noqa: PLC0415
    from experiments.results.neurons import Analysis, Measurements, write_results  # noqa: PLC0415

    told: dict[str, Any] = {"percent": percent, "seeds_per_pair": seeds_per_pair, "seed": seed}
    told |= {"units": units or None, "spread": spread or None}
    analysis = Analysis(**{name: value for name, value in told.items() if value is not None})
    keep_freed_memory()
    summaries, missing = _collected(experiment, overrides)
    measurements = Measurements(analysis, job_of_summary)
    runs = [measurements.of(summary) for summary in summaries]
    print_paths(write_results(runs, analysis, _named(experiment, overrides), folder, missing=missing))


def probes(store: StoreFolder = ARTIFACTS, folder: Folder = RESULTS) -> None:
    """Say which attacks tell models that know a concept from models that never knew it."""
    from experiments.job.summary import read_summaries  # noqa: PLC0415
    from experiments.results.probes import write_probes  # noqa: PLC0415

    print_paths(write_probes(read_summaries(store), folder))


def print_paths(paths: Sequence[Path]) -> None:
    """Say where files are, a line each."""
    for path in paths:
        print(path)


def _named(experiment: str, overrides: Sequence[str] | None) -> str:
    """What the files are called: overrides make another name, so that a variation leaves the experiment's own alone.

    Where the store lies makes no variation.
    """
    varied = [override for override in overrides or [] if not override.startswith("store=")]
    return re.sub(r"[^\w=.,+-]+", "-", "_".join([experiment, *varied]))


def _collected(experiment: str, overrides: Sequence[str] | None) -> tuple[list[dict[str, Any]], list[str]]:
    from experiments.command.collect import collect_runs  # noqa: PLC0415

    found, missing = collect_runs(experiment, overrides or [])
    if missing:
        print(f"{len(missing)} of {len(found) + len(missing)} runs are missing from the store.", file=sys.stderr)
    return found, missing
