"""Runs of the store by their names, and what they were made of."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from diffusion.model import TextToImage
from diffusion.sampling import Sampling
from erasure.edit import Edit
from evaluation.prompt_sets import PromptRow
from experiments.command.collect import as_composed_now
from experiments.command.config import build, make_object
from experiments.command.errors import CommandError
from experiments.job.drawing import stored_edit
from experiments.job.origin import computing_threads
from experiments.job.remote_store import fetch_summaries
from experiments.job.result import RUNS
from experiments.job.settings import Job
from experiments.job.store import read_json, unchecked
from experiments.job.summary import read_summaries

SUMMARY = "summary.json"


def run_named(name: str, store: Path) -> dict[str, Any]:
    """The summary of the run whose name is, or begins with, ``name``.

    Raises:
        CommandError: There is none, or there are several.
    """
    if not store.is_dir():
        raise CommandError(f"store is {store}, which is no folder; name the folder of the runs with --store.")
    summaries = {summary["run"]: summary for summary in read_summaries(store)}
    if name in summaries:
        return summaries[name]
    fitting = [run for run in summaries if name and run.startswith(name)]
    if len(fitting) == 1:
        return summaries[fitting[0]]
    if fitting:
        raise CommandError(f"run is {name}, and several runs begin so: {', '.join(fitting)}; write more of the name.")
    if not summaries:
        raise CommandError(f"run is {name}, and the store {store} has no runs; `eraselab run` makes them.")
    nearest = get_close_matches(name, summaries, n=1, cutoff=0.0)[0]
    raise CommandError(
        f"run is {name}, which the store {store} does not have; did you mean {nearest}? `eraselab runs` lists them all."
    )


def job_of_summary(summary: Mapping[str, Any]) -> Job:
    """The job that a run did, built again from its config."""
    return build(config_of(summary), summary["choices"])


def config_of(summary: Mapping[str, Any]) -> DictConfig:
    """A run's config, with the fields that older runs lack."""
    config: DictConfig = OmegaConf.create(as_composed_now(summary["config"]))
    return config


@dataclass(frozen=True)
class LoadedRun:
    """A run with its model and its edit in memory.

    Attributes:
        summary: Its numbers.
        model: The base model, unedited.
        edit: What was erased in it.
    """

    summary: dict[str, Any]
    model: TextToImage
    edit: Edit

    def sampling(self, steps: int | None = None) -> Sampling:
        """How the run's pictures were sampled, but with ``steps`` if they are given."""
        own = Sampling(**self.summary["config"]["sampling"])
        return own if steps is None else replace(own, steps=steps)

    def guidance(self) -> float:
        """The guidance scale of the run's first prompt.

        Raises:
            FileNotFoundError: The run's prompts are not there any more.
        """
        rows: list[PromptRow] = make_object(config_of(self.summary), "prompt_set").read()
        return rows[0].guidance

    def threads(self) -> AbstractContextManager[None]:
        """Let PyTorch compute with as many CPU threads as in the run, as pictures depend on that in the last digit."""
        return computing_threads(self.model, self.summary["config"].get("threads"))


def load_run(name: str, store: Path) -> LoadedRun:
    """A run by its name, ready for use.

    Raises:
        CommandError: There is no such run, or its model is another by now.
        FileNotFoundError: Its edit or its model is not there any more.
        ValueError: They are damaged.
    """
    summary = run_named(name, store)
    edit = stored_edit(store, summary["artefacts"]["edit"])
    model: TextToImage = make_object(config_of(summary), "model").load()
    base = edit.metadata.get("base")
    if edit and base is not None and base != model.fingerprint():
        raise CommandError(
            f"The run {summary['run']} erased from another model than {model.name!r} is now (its weights differ); put "
            f"the weights of then at {summary['config']['model']['source']}."
        )
    return LoadedRun(summary, model, edit)


def find_runs(names: Sequence[str], store: Path) -> list[dict[str, Any]]:
    """The summaries that ``names`` stand for, each once, with their ``path``.

    Args:
        names: Names of runs in ``store``; or summary.json files, folders with one, or folders of such folders.
        store: Where runs are looked up by name.

    Raises:
        CommandError: There is no such run.
        ValueError: A summary is damaged.
    """
    fetch_summaries(store)
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        for path in _summaries(name, store):
            summary = read_json(path)
            if not isinstance(summary, dict) or not {"run", "rates", "cases", "config"} <= summary.keys():
                raise CommandError(f"{path} is no summary of a run; give a run's summary.json or its folder.")
            # Those of older versions have no checksum.
            if "checksum" in summary:
                try:
                    summary = unchecked(summary)
                except ValueError as error:
                    raise CommandError(f"{path} is damaged: {error}; repeat the run's command.") from error
            found.setdefault(summary["run"], {**summary, "path": str(path)})
    return list(found.values())


def _summaries(name: str, store: Path) -> list[Path]:
    if (path := store / RUNS / name / SUMMARY).is_file():
        return [path]
    given = Path(name)
    if given.is_file():
        return [given]
    if given.is_dir():
        inside = [given / SUMMARY] if (given / SUMMARY).is_file() else sorted(given.glob(f"*/{SUMMARY}"), key=_order)
        if inside:
            return inside
        raise CommandError(f"The folder {given} has no {SUMMARY}; give a run's folder, or that of a sweep.")
    known = [path.parent.name for path in (store / RUNS).glob(f"*/{SUMMARY}")]
    if not known:
        raise CommandError(f"{name} is no file or folder, and the store {store} has no runs.")
    nearest = get_close_matches(name, known, n=3) or sorted(known)[:3]
    raise CommandError(f"{name} is no file, no folder and no run in {store}; did you mean {', '.join(nearest)}?")


def _order(path: Path) -> tuple[int, str]:
    """Jobs of a sweep by their numbers."""
    name = path.parent.name
    return (int(name) if name.isdigit() else 0, name)
