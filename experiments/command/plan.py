"""What a command would do, without doing it: ``dry_run=true``."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from omegaconf import DictConfig
from rich.table import Table

from experiments.command.collect import StoredRun, find_run, made_by_other_code, read_runs
from experiments.command.composing import plain_job, typed
from experiments.fit import fitted
from experiments.results.screen import open_console

_GROUPS = ("model", "eraser", "pruning", "attack")


def show_plan(jobs: Sequence[DictConfig]) -> None:
    """Print each job, whether the store has it, and what it may cost, told from similar runs in the store."""
    table = Table(title=f"{len(jobs)} jobs, none of which was run", title_justify="left")
    for heading in ("job", "overrides", "in the store", "U-Net evaluations", "time"):
        table.add_column(heading)
    unknown, seconds, stores = 0, 0.0, dict[str, list[StoredRun]]()
    for number, job in enumerate(jobs, start=1):
        config = fitted(plain_job(job)[0])
        store = str(config["store"])
        if store not in stores:
            stores[store] = read_runs(store)
        done = None if config["fresh"] else find_run(config, stores[store])
        if done is not None and made_by_other_code(done):
            done = None
        cost = None if done else _similar(config, stores[store])
        overrides = " ".join(typed(job.hydra.overrides.task))
        if done is not None:
            table.add_row(str(number), overrides, f"run {done['run']}", "0", "seconds")
        elif cost is None:
            unknown += 1
            table.add_row(str(number), overrides, "no", "", "unknown")
        else:
            seconds += cost[1]
            table.add_row(str(number), overrides, "no", f"{cost[0]:,.0f}", f"{cost[1] / 60:.0f} min")
    console = open_console()
    console.print(table)
    untold = f", and {unknown} jobs like none in the store" if unknown else ""
    console.print(f"About {seconds / 60:.0f} minutes in all{untold}; stages that jobs share are counted once for each.")


def _similar(config: Mapping[str, Any], runs: Sequence[StoredRun]) -> tuple[float, float] | None:
    """Evaluations and seconds of runs of the same classes, for as many prompts; None if there are none."""

    def classes(of: Mapping[str, Any]) -> list[Any]:
        return [of[group].get("_target_") for group in _GROUPS]

    costs = []
    for summary in (run.summary for run in runs):
        if classes(summary["config"]) == classes(config):
            scale = config["prompts"] / summary["n"]
            stages = {stage: scale if stage == "attack" else 1.0 for stage in summary["costs"]}
            costs.append(
                [
                    sum(factor * summary["costs"][stage][what] for stage, factor in stages.items())
                    for what in ("unet_evaluations", "seconds")
                ]
            )
    return (median(c[0] for c in costs), median(c[1] for c in costs)) if costs else None
