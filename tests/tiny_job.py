"""Whole jobs on the tiny model, for tests that run them here or kill them in another process."""

import importlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from pydantic.dataclasses import dataclass

from diffusion.model import TextToImage
from evaluation.verdicts import Verdicts
from experiments.command.composing import plain_job
from experiments.command.config import build
from experiments.command.shorthands import spell_out
from experiments.fit import fitted
from experiments.job.job import run_job
from experiments.job.settings import Job
from experiments.job.store import read_json
from experiments.results.screen import show_job

CONFIG_FOLDER = Path(__file__).resolve().parents[1] / "conf"
PROMPTS = ("a church", "a red fish", "a golf ball in the snow", "a photo of a church", "two blue fish", "a parachute")


@dataclass(frozen=True)
class Float64Folder:
    """The tiny model in float64, where a verdict does not hang on the order of a sum."""

    source: Path

    def load(self) -> TextToImage:
        torch.set_num_threads(1)
        return TextToImage(StableDiffusionPipeline.from_pretrained(self.source, torch_dtype=torch.float64), name="tiny")


@dataclass(frozen=True)
class ErraticJudge:
    """A fixed function of the pixels that any change of a picture upsets; one picture in three shows the concept.

    ``weights`` is a file with the remainder that counts as the concept.
    """

    weights: Path | None = None

    def __call__(self, images: torch.Tensor) -> Verdicts:
        sums = images.long().sum(dim=(1, 2, 3))
        wanted = int(self.weights.read_text()) if self.weights else 1
        return Verdicts(sums % 3 == wanted, (sums % 101) / 100)


@dataclass(frozen=True)
class LabellingJudge:
    """The verdicts of :class:`ErraticJudge` with the labels that they come from: always A, and at times B twice."""

    def __call__(self, images: torch.Tensor) -> Verdicts:
        verdicts = ErraticJudge()(images)
        twice = (images.long().sum(dim=(1, 2, 3)) % 2).tolist()
        labels = [["A"] + 2 * ["B"] * odd if there else [] for there, odd in zip(verdicts.present, twice, strict=True)]
        return Verdicts(verdicts.present, verdicts.score, {"labels": labels})


def write_world(folder: Path) -> None:
    """Prompt sets for :func:`overrides`."""
    for name, prompts in (("concept", PROMPTS), ("retained", PROMPTS[::-1])):
        lines = [f"{number},{prompt},{61 + number},3.0" for number, prompt in enumerate(prompts)]
        header = "case_number,prompt,evaluation_seed,evaluation_guidance"
        (folder / f"{name}.csv").write_text("\n".join([header, *lines]) + "\n")


def overrides(world: Path, store: Path) -> list[str]:
    """The command line of a small job; ``world`` holds the model (``model/``) and the prompt sets."""
    return [
        "~model",
        "+model._target_=tests.tiny_job.Float64Folder",
        f"+model.source={world / 'model'}",
        "~judge",
        "+judge._target_=tests.tiny_job.ErraticJudge",
        f"concept.prompts={world / 'concept.csv'}",
        f"concept.retained_prompts={world / 'retained.csv'}",
        "evaluator=none",
        "tracker=off",
        "transfer.seeds=0",
        f"store={store}",
        "prompts=5",
        "retained=4",
        "sampling.steps=2",
        "sampling.batch_size=2",
        "attack.timesteps=3",
        "attack.steps_per_timestep=2",
        "attack.batch_size=2",
        "eraser.steps=6",
        "eraser.trajectories=4",
        "eraser.batch_size=2",
        "eraser.sampling_steps=2",
        "eraser.sampling_batch_size=16",
    ]


def canvas_overrides(canvas: Path, twins: Path, world: Path) -> list[str]:
    """The command line of a small job on a canvas in place of the tiny model, without its eraser.

    Prompt sets and store lie in ``world``.
    """
    write_world(world)
    fields = {part: part.lstrip("~+").partition("=")[0].partition(".")[0] for part in overrides(world, world / "store")}
    kept = [part for part, field in fields.items() if field not in {"eraser", "model"}]
    return [*kept, f"model.source={canvas}", f"model.build={twins}"]


def method_config(group: str, name: str, kind: str = "style", **others: Any) -> DictConfig:
    """A method's own YAML file with its settings fitted to the canvas, or to what ``others`` of the config say."""
    method = OmegaConf.load(CONFIG_FOLDER / group / f"{name}.yaml")
    config = OmegaConf.create({"seed": 7, "concept": {"kind": kind}, **others, group: method})
    return OmegaConf.create(fitted(config)[group])


def make_job(*command: str) -> Job:
    """What ``python run.py <command>`` would run."""
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        return build(*plain_job(compose("config", spell_out(command), return_hydra_config=True)))


def run(command: list[str], folder: Path) -> dict[str, Any]:
    """Run a job; returns its summary."""
    folder.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = read_json(run_job(make_job(*command), folder, show_job))
    return summary


def run_and_die(command: list[str], folder: Path, name: str, call: int, *, torn: bool = False) -> None:
    """Run a job that is killed as by ``kill -9`` at the ``call``-th call of the function ``name``.

    Args:
        command: Its command line.
        folder: Its run folder.
        name: ``module:function`` or ``module:Class.method``.
        call: Which call, from 1; it is not made.
        torn: Write half a line to the journal first (``name`` is ``Journal.append``).
    """
    module, _, path = name.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, attribute = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original: Callable[..., Any] = getattr(owner, attribute)
    calls = 0

    def deadly(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            if torn:
                with arguments[0].path.open("a") as file:
                    file.write('{"id": "3-')
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **named)

    setattr(owner, attribute, deadly)
    run(command, folder)
