"""The console command ``eraselab``."""

import logging
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from omegaconf import OmegaConf

from diffusion.allocator import keep_freed_memory
from erasure.neurons import Spread, Units
from experiments.command import calibrate as calibration
from experiments.command import paper as benchmark
from experiments.command.collect import collect_runs
from experiments.command.config import build
from experiments.command.errors import CommandError, one_sentence
from experiments.command.paper import EVALUATIONS_PER_SECOND
from experiments.command.plugins import take_plugins
from experiments.command.report_command import register as register_reports
from experiments.command.side_by_side import side_by_side
from experiments.job.settings import Job
from experiments.job.summary import read_summaries
from experiments.results.claim import write_claim
from experiments.results.figures import write_figure
from experiments.results.neurons import Analysis, Measurements, write_results
from experiments.results.probes import write_probes
from experiments.results.tables import write_tables

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
register_reports(app)

Experiment = Annotated[str, typer.Argument(help="A preset of conf/experiment.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="The overrides that its sweep was run with.")]
Folder = Annotated[Path, typer.Option(help="Where the files go.")]
RESULTS = Path("results")


@app.command()
def tables(experiment: Experiment = "table1", overrides: Overrides = None, folder: Folder = RESULTS) -> None:
    """Collect an experiment's runs into tables."""
    summaries, missing = _collected(experiment, overrides)
    _print(write_tables(summaries, _named(experiment, overrides), folder, missing=missing))


@app.command()
def figure(experiment: Experiment = "attacks", overrides: Overrides = None, folder: Folder = RESULTS) -> None:
    """Draw an experiment's attack success rates against their cost, or against what is retained."""
    summaries, _ = _collected(experiment, overrides)
    _print([write_figure(summaries, _named(experiment, overrides), folder)])


@app.command()
def claim(experiment: Experiment = "claim", overrides: Overrides = None, folder: Folder = RESULTS) -> None:
    """Compare pruned methods with their erasers alone, as the paper's claim asks."""
    summaries, missing = _collected(experiment, overrides)
    _print([write_claim(summaries, _named(experiment, overrides), folder, missing=missing)])


@app.command()
def probes(
    store: Annotated[Path, typer.Option(help="Where the runs lie.")] = Path("artifacts"), folder: Folder = RESULTS
) -> None:
    """Say which attacks tell models that know a concept from models that never knew it."""
    _print(write_probes(read_summaries(store), folder))


@app.command()
def neurons(
    experiment: Experiment = "neurons",
    overrides: Overrides = None,
    folder: Folder = RESULTS,
    *,
    units: Annotated[Units, typer.Option(help="What counts as a neuron.")] = Analysis.units,
    spread: Annotated[Spread, typer.Option(help="What matched differences are divided by.")] = Analysis.spread,
    percent: Annotated[float, typer.Option(help="How many neurons count as correlated.")] = Analysis.percent,
    seeds_per_pair: Annotated[int, typer.Option(help="Pictures of each pair of prompts.")] = Analysis.seeds_per_pair,
    seed: Annotated[int, typer.Option(help="Of those pictures, the random neurons and the bootstrap.")] = Analysis.seed,
) -> None:
    """Look at the neurons that go with a concept: erased, and under attack."""
    analysis = Analysis(units=units, spread=spread, percent=percent, seeds_per_pair=seeds_per_pair, seed=seed)
    keep_freed_memory()
    summaries, missing = _collected(experiment, overrides)
    measurements = Measurements(analysis, job_of_summary)
    runs = [measurements.of(summary) for summary in summaries]
    _print(write_results(runs, analysis, _named(experiment, overrides), folder, missing=missing))


@app.command()
def calibrate(
    overrides: Annotated[list[str] | None, typer.Argument(help="As for run: judge=nudenet concept=church.")] = None,
    folder: Folder = RESULTS,
    *,
    pictures: Annotated[
        Path | None, typer.Option(help="Folder with present/ and absent/, or CSV file,present; else they are drawn.")
    ] = None,
    drawn: Annotated[int, typer.Option(min=2, help="How many pictures the canvas draws.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the drawing; the canvas was trained with seed 0.")] = 1000,
) -> None:
    """Measure how often a judge errs."""
    result = calibration.run(overrides or [], pictures, drawn, seed)
    print(calibration.markdown(result))
    _print(calibration.write_calibration(result, folder))


@app.command()
def paper(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="As for run; paper.scale=smoke for all in small.")
    ] = None,
    folder: Folder = RESULTS,
    *,
    evaluations_per_second: Annotated[float, typer.Option(help="Of your GPU, for the hours.")] = EVALUATIONS_PER_SECOND,
    yes: Annotated[bool, typer.Option("--yes", help="Run the plan if nothing is missing.")] = False,
) -> None:
    """Run the paper's benchmark: say what is missing, print the plan, and the table beside published numbers."""
    typed, smoke = benchmark.scale_of(overrides or [])
    jobs = benchmark.cells(typed, smoke=smoke)
    configs = benchmark.composed(jobs)
    missing = benchmark.missing_files(configs)
    if missing:
        print(benchmark.listed(missing))
    if not smoke:
        plan = benchmark.plan(jobs, configs, evaluations_per_second)
        print(plan.to_markdown(index=False))
        rate = f"{evaluations_per_second:g} U-Net evaluations a second"
        print(f"{len(jobs)} jobs, about {plan['hours'].sum():,.0f} hours on one GPU at {rate}.")
    if missing:
        sys.exit("Nothing was run: files are missing, as listed above.")
    if not (smoke or yes):
        sys.exit("Nothing was run; --yes runs it.")
    table = benchmark.results(jobs, benchmark.run_cells(jobs, Path("outputs") / "paper"))
    print(table.to_markdown(index=False))
    _print([benchmark.write_results(table, folder, smoke=smoke)])


@app.command()
def settings(
    choice: Annotated[str | None, typer.Argument(help="One method, as eraser=esd; all of them without.")] = None,
) -> None:
    """Print what every eraser, pruning and attack takes on the canvas and on Stable Diffusion, side by side."""
    for name, table in side_by_side(choice):
        print(f"\n## {name}\n")
        print(table.to_markdown(index=False, disable_numparse=True))


def _named(experiment: str, overrides: Sequence[str] | None) -> str:
    """What the files are called: overrides make another name, so that a variation leaves the experiment's own alone."""
    return re.sub(r"[^\w=.,+-]+", "-", "_".join([experiment, *(overrides or [])]))


def _collected(experiment: str, overrides: Sequence[str] | None) -> tuple[list[dict[str, Any]], list[str]]:
    found, missing = collect_runs(experiment, overrides or [])
    if missing:
        print(f"{len(missing)} of {len(found) + len(missing)} runs are missing from the store.", file=sys.stderr)
    return found, missing


def job_of_summary(summary: Mapping[str, Any]) -> Job:
    """The job that a run did, built again from its config."""
    return build(OmegaConf.create(dict(summary["config"])), summary["choices"])


def _print(paths: Sequence[Path]) -> None:
    for path in paths:
        print(path)


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
