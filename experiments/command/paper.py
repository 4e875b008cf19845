"""The paper's benchmark as one command: three concepts x five methods x four attacks, by the published protocols."""

import importlib.util
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import try_to_load_from_cache
from hydra import compose, initialize_config_dir

from diffusion.canvas.canvases import CANVASES
from diffusion.sources import HUB_ID, is_cached
from evaluation.prompt_sources import Download
from experiments import CONFIG_FOLDER
from experiments.command.composing import plain_job
from experiments.command.config import build
from experiments.command.errors import CommandError, explain
from experiments.command.shorthands import spell_out
from experiments.fit import fitted
from experiments.job.job import run_job
from experiments.job.store import read_json
from experiments.results.published import published_numbers
from experiments.results.screen import measure_text, show_job

log = logging.getLogger(__name__)

CONCEPTS = {"nudity": "nudity", "van_gogh": "artist/van_gogh", "church": "object/church"}
"""The paper's tasks and their concepts on Stable Diffusion."""

CANVAS_CONCEPTS = {"nudity": "fire", "van_gogh": "van_gogh", "church": "church"}
"""What stands for them on the canvas."""

METHODS = {
    "none": ["eraser=none", "pruning=off"],
    "ESD": ["eraser=esd", "pruning=off"],
    "P-ESD": ["eraser=esd", "pruning=on"],
    "AC": ["eraser=ac", "pruning=off"],
    "P-AC": ["eraser=ac", "pruning=on"],
}

ATTACKS = ("no attack", "UnlearnDiffAtk", "P4D", "Ring-A-Bell")

PROMPTS = {
    "unlearndiffatk": {"nudity": 142, "van_gogh": 50, "church": 50},
    "p4d": {"nudity": 361},
    "ringabell": {"nudity": 95},
}
"""How many prompts the sets have, by protocol and task."""

CAPTIONS = 10_000
"""Of COCO, as in AdvUnlearn's table."""

FILES = {
    "judge.network": "checkpoints/style_classifier",
    "judge.file": "checkpoints/classifier_model.onnx",
    "evaluator.fid.reference": "checkpoints/coco_10k",
}
"""Where files are looked for that no package brings."""

SMOKE = (
    *("prompts=2", "sampling.steps=2", "sampling.batch_size=4", "prompt_set=own", "retained_set=own", "retained=2"),
    *("judge=canvas", "model.scheduler=ddim", "retained_sampling=null", "protocol.targets.steps=2", "tracker=off"),
)
SMOKE_ERASERS = {
    "none": (),
    "esd": ("eraser.steps=2", "eraser.sampling_steps=2", "eraser.trajectories=2", "eraser.batch_size=2"),
    "ac": ("eraser.steps=2", "eraser.sampling_steps=2", "eraser.images=2", "eraser.retain_weight=0"),
}
SMOKE_ATTACKS = {
    "no attack": (),
    "UnlearnDiffAtk": ("attack.timesteps=1", "attack.steps_per_timestep=2"),
    "P4D": ("attack.checks=1", "attack.steps_per_check=2"),
    "Ring-A-Bell": ("attack.population=8", "attack.generations=2"),
}

EVALUATIONS_PER_SECOND = 40.0
"""An assumption: samples of 512 pixels through Stable Diffusion 1.4's U-Net by one A100 in bfloat16, in batches."""

BACKWARD = 2
"""U-Net evaluations that a backward pass is counted as."""


@dataclass(frozen=True)
class Cell:
    """One job of the benchmark.

    Attributes:
        task: Which of the paper's tasks.
        method: One of :data:`METHODS`.
        attack: One of :data:`ATTACKS`.
        overrides: Its command line.
    """

    task: str
    method: str
    attack: str
    overrides: tuple[str, ...]


def cells(typed: Sequence[str], *, smoke: bool) -> list[Cell]:
    """All jobs; ``typed`` overrides win in each. In small they run on the canvas unless a model is typed."""
    return [
        Cell(task, method, attack, tuple(_overrides(task, method, attack, typed, smoke=smoke)))
        for task, method, attack in itertools.product(CONCEPTS, METHODS, ATTACKS)
    ]


def scale_of(overrides: Sequence[str]) -> tuple[list[str], bool]:
    """The overrides without ``paper.scale=``, and whether that is ``smoke``.

    Raises:
        CommandError: It is neither that nor ``full``.
    """
    scales = [override.partition("=")[2] for override in overrides if override.startswith("paper.scale=")] or ["full"]
    if unknown := set(scales) - {"smoke", "full"}:
        raise CommandError(f"paper.scale is {min(unknown)!r}; it must be smoke or full.")
    return [override for override in overrides if not override.startswith("paper.scale=")], scales[-1] == "smoke"


def _overrides(task: str, method: str, attack: str, typed: Sequence[str], *, smoke: bool) -> Iterator[str]:
    given = {override.partition("=")[0] for override in typed}
    if "model" not in given:
        yield "model=canvas" if smoke else "model=sd14"
    on_canvas = smoke and ("model" not in given or "model=canvas" in typed)
    yield f"concept={(CANVAS_CONCEPTS if on_canvas else CONCEPTS)[task]}"
    yield from METHODS[method]
    own = {"no attack": "advunlearn", "UnlearnDiffAtk": "unlearndiffatk", "P4D": "p4d", "Ring-A-Bell": "ringabell"}
    published = attack in {"no attack", "UnlearnDiffAtk"} or (task == "nudity" and not smoke)
    yield f"protocol={own[attack] if published else 'unlearndiffatk'}"
    # P4D and Ring-A-Bell have no prompts of their own for a style and an object; P4D's are Diffusion-MU-Attack's there.
    choices = {"no attack": "none", "UnlearnDiffAtk": "unlearndiff", "P4D": "p4d", "Ring-A-Bell": "ringabell"}
    yield f"attack={choices[attack]}"
    if attack == "P4D" and not published:
        yield "attack.preset=mu_attack"
    if smoke:
        yield from SMOKE
        yield "evaluator=canvas" if on_canvas and attack == "no attack" else "evaluator=none"
        yield from SMOKE_ERASERS[METHODS[method][0].removeprefix("eraser=")]
        yield from ("pruning.steps=2",) if method.startswith("P-") else ()
        yield from SMOKE_ATTACKS[attack]
    else:
        yield from _file_overrides(task, attack, published=published)
    yield from typed


def _file_overrides(task: str, attack: str, *, published: bool) -> Iterator[str]:
    if task == "van_gogh":
        yield f"judge.network={FILES['judge.network']}"
    if task == "nudity" and not (attack == "P4D" and published):
        yield "judge=nudenet_reference"
    if attack == "no attack":
        yield f"evaluator.fid.reference={FILES['evaluator.fid.reference']}"


def composed(jobs: Iterable[Cell]) -> list[dict[str, Any]]:
    """The jobs' configs as plain data."""
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        return [
            fitted(plain_job(compose("config", spell_out(job.overrides), return_hydra_config=True))[0]) for job in jobs
        ]


@dataclass(frozen=True)
class Missing:
    """A file that a job needs and that is not there.

    Attributes:
        name: What it is.
        place: Where it is looked for.
        how: How to get it.
    """

    name: str
    place: str
    how: str


def missing_files(configs: Iterable[Mapping[str, Any]]) -> list[Missing]:
    """What the jobs need and is not there, each once."""
    return list(dict.fromkeys(missing for config in configs for missing in _missing(config)))


def _missing(config: Mapping[str, Any]) -> Iterator[Missing]:
    source = str(config["model"]["source"])
    if source not in CANVASES and not Path(source).expanduser().exists() and not is_cached(source):
        how = f"hf download {source} --local-dir sd14, and add model.source=sd14"
        yield Missing("the model", f"the Hub's cache, or a folder for model.source={source}", how)
    for name in ("prompt_set", "retained_set"):
        source = config[name]["source"]
        if "url" in source:
            place = Download(source["url"], source["sha256"], source.get("cache")).place
            if not place.is_file():
                how = f"fetched at the first run, or curl -L {source['url']} -o '{place}'"
                yield Missing(f"prompts {Path(source['url']).name}", str(place), how)
    if (pairs := config["attack"].get("pairs")) and not Path(pairs).is_file():
        yield Missing("pairs of prompts", str(pairs), "write a CSV file with the columns with,without")
    if (clip := (config["attack"].get("features") or {}).get("folder")) and not _at_hand(clip):
        yield Missing("the CLIP that P4D chooses by", f"the Hub's cache, as {clip}", f"hf download {clip}")
    yield from _missing_of_judge(config["judge"])
    for evaluator in config["evaluator"].values():
        yield from _missing_of_evaluator(evaluator)


def _missing_of_judge(judge: Mapping[str, Any]) -> Iterator[Missing]:
    kind = judge["_target_"].rpartition(".")[2]
    network, file = judge.get("network"), judge.get("file")
    if kind == "StyleJudge" and not (network and Path(network).is_dir()):
        how = "results/checkpoint-2800 of the drive that the README of github.com/OPTML-Group/Diffusion-MU-Attack names"
        yield Missing("UnlearnDiffAtk's classifier of artists", str(network), how)
    if kind == "ObjectJudge" and not _at_hand(str(network)):
        yield Missing("ResNet-50 on ImageNet", f"the Hub's cache, as {network}", f"hf download {network}")
    if file and not Path(file).is_file():
        how = "github.com/notAI-tech/NudeNet/releases/download/v0/classifier_model.onnx"
        yield Missing("NudeNet's classifier", str(file), how)
    if kind == "NudeNet" and not file and importlib.util.find_spec("nudenet") is None:
        yield Missing("NudeNet's detector", "the Python package nudenet", "pip install nudenet")


def _missing_of_evaluator(evaluator: Mapping[str, Any]) -> Iterator[Missing]:
    if (folder := evaluator.get("reference")) and not (Path(folder).is_dir() and any(Path(folder).iterdir())):
        yield Missing("10,000 photographs of COCO", str(folder), "data/imgs/coco_10k, which AdvUnlearn's README links")
    if evaluator["_target_"].endswith("FrechetDistance") and not evaluator["extractor"].get("weights"):
        place = Path.home() / ".cache/torch/hub/checkpoints/weights-inception-2015-12-05-6726825d.pth"
        if not place.is_file():
            address = "github.com/toshas/torch-fidelity/releases/download/v0.2.0/" + place.name
            yield Missing("Inception's weights", str(place), f"fetched at the first run, or https://{address}")
    clip = ("timm/vit_base_patch32_clip_224.openai", "open_clip_config.json")
    if evaluator["_target_"].endswith("OpenClipScore") and evaluator["weights"] == "openai" and not _at_hand(*clip):
        yield Missing("CLIP ViT-B/32", "the Hub's cache", "fetched at the first run: open_clip's openai weights")


def _at_hand(name: str, file: str = "config.json") -> bool:
    if Path(name).is_dir():
        return True
    return HUB_ID.fullmatch(name) is not None and isinstance(try_to_load_from_cache(name, file), str)


def listed(missing: Sequence[Missing]) -> str:
    """One list of all that is missing."""
    lines = [f"{number}. {file.name}: not in {file.place}; {file.how}" for number, file in enumerate(missing, start=1)]
    return "\n".join([f"{len(missing)} things are missing:", *lines])


def evaluations(cell: Cell, config: Mapping[str, Any]) -> dict[tuple[str, ...], float]:
    """The most U-Net evaluations that the stages of a job can take, by what tells them from other jobs' stages."""
    steps = 2 * int(config["sampling"]["steps"])
    protocol = str(config["protocol"]["name"])
    known = PROMPTS.get(protocol, PROMPTS["unlearndiffatk"])
    prompts = min(int(config["prompts"]), known.get(cell.task, int(config["prompts"])))
    edit = (cell.task, cell.method)
    found: dict[tuple[str, ...], float] = {
        ("base", cell.task, protocol): prompts * steps,
        ("edit", *edit): _edit_evaluations(config),
        # What is not edited has the base model's pictures.
        ("erased", *edit, protocol): 0 if cell.method == "none" else prompts * steps,
        ("attack", *edit, cell.attack): prompts * _attack_evaluations(config, steps),
    }
    if config["evaluator"]:
        retained = min(int(config["retained"]), CAPTIONS)
        sampling = config["retained_sampling"] or config["sampling"]
        pictures = retained * 2 * int(sampling["steps"])
        found |= {("base", "captions"): pictures, ("captions", *edit): 0 if cell.method == "none" else pictures}
    return found


def _edit_evaluations(config: Mapping[str, Any]) -> float:
    eraser, pruning = config["eraser"], config["pruning"]
    steps = pruning.get("steps", 0) if pruning["_target_"].endswith("Learned") else eraser.get("steps", 0)
    samples = steps * eraser.get("batch_size", 1)
    learning = 1 + BACKWARD
    if eraser["_target_"].endswith("ESD"):
        # A trajectory stops half-way on the average, both halves of guidance; the teacher is asked twice.
        return float(samples * (eraser["sampling_steps"] + 2 + learning))
    if eraser["_target_"].endswith("AC"):
        prior = learning if eraser["prior_weight"] else 0
        return float(eraser["images"] * eraser["sampling_steps"] * 2 + samples * (1 + learning + prior))
    return 0.0


def _attack_evaluations(config: Mapping[str, Any], picture: int) -> float:
    attack = config["attack"]
    kind = attack["_target_"].rpartition(".")[2]
    learning = 1 + BACKWARD
    if kind == "UnlearnDiffAtk":
        return float(attack["timesteps"] * (attack["steps_per_timestep"] * learning + picture))
    if kind == "P4D":
        searches = 2 if attack["variant"] == "union" else 1
        return float(searches * attack["checks"] * (attack["steps_per_check"] * (1 + learning) + picture))
    return float(picture) if kind == "RingABell" else 0.0


def plan(jobs: Sequence[Cell], configs: Sequence[Mapping[str, Any]], per_second: float) -> pd.DataFrame:
    """One row a job: the evaluations that it adds to those before it, hours on one GPU, and memory there."""
    counted: set[tuple[str, ...]] = set()
    rows = []
    for cell, config in zip(jobs, configs, strict=True):
        stages = {key: value for key, value in evaluations(cell, config).items() if key not in counted}
        counted |= stages.keys()
        total = sum(stages.values())
        rows.append(
            {
                "task": cell.task,
                "method": cell.method,
                "attack": cell.attack,
                "U-Net evaluations, at most": f"{total:,.0f}",
                "hours": round(total / per_second / 3600, 1),
                "GPU memory, about": f"{_memory(cell, config):.0f} GiB",
            }
        )
    return pd.DataFrame(rows)


_TRAINED = {"xattn_kv": 0.019, "xattn": 0.044, "attn": 0.1, "xattn_ffn": 0.193, "noxattn": 0.813, "esd_u": 0.813}
"""Weights of Stable Diffusion 1.4's scopes, in thousand millions."""


def _memory(cell: Cell, config: Mapping[str, Any]) -> float:
    """GiB: weights, what training holds for each trained one (itself, gradient, Adam's two), activations of a batch."""
    model, activations = 4.1, 3.5
    pruned = config["pruning"]["_target_"].endswith("Learned")
    scope = (config["pruning"] if pruned else config["eraser"]).get("scope")
    trained = 0.0 if cell.method == "none" else _TRAINED.get(str(scope), 0.86) * (6 if pruned else 5) * 4 / 1.074
    batch = int(config["attack"].get("batch_size", 1)) if cell.attack in {"UnlearnDiffAtk", "P4D"} else 1
    return model + max(trained + activations * int(config["eraser"].get("batch_size", 1)), activations * batch)


def run_cells(jobs: Sequence[Cell], folder: Path) -> list[dict[str, Any] | None]:
    """The jobs' summaries; None for one that failed, which is told and ends no other."""
    summaries: list[dict[str, Any] | None] = []
    for number, cell in enumerate(jobs, start=1):
        log.info("[%d/%d] %s, %s, %s", number, len(jobs), cell.task, cell.method, cell.attack)
        try:
            with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
                config = compose("config", spell_out(cell.overrides), return_hydra_config=True)
            own = folder / f"{number:02d}"
            own.mkdir(parents=True, exist_ok=True)
            summaries.append(read_json(run_job(build(*plain_job(config)), own, show_job)))
        except Exception as error:
            sentence = explain(error)
            if sentence is None:
                raise
            log.error("this job failed: %s", sentence)
            summaries.append(None)
    return summaries


def results(jobs: Sequence[Cell], summaries: Sequence[Mapping[str, Any] | None]) -> pd.DataFrame:
    """One row a task and method: success by attack, CLIP score and FID, the published number in brackets."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    published = [_published(config) for config in composed(cells([], smoke=False))]
    for cell, summary, numbers in zip(jobs, summaries, published, strict=True):
        row = rows.setdefault((cell.task, cell.method), {"task": cell.task, "method": cell.method})
        metric = "pre-ASR" if cell.attack == "no attack" else "ASR"
        row[cell.attack] = _cell(_success(summary), numbers.get(metric))
        if cell.attack == "no attack":
            measures = summary["measures"] if summary else {}
            for name, theirs in (("CLIP score", "CLIP"), ("FID", "FID")):
                value = measures.get(name.lower().replace(" ", "_"))
                row[name] = _cell(None if value is None else measure_text(value), numbers.get(theirs))
    return pd.DataFrame(rows.values()).fillna("")[["task", "method", *ATTACKS, "CLIP score", "FID"]]


def _cell(own: str | None, published: str | None) -> str:
    return (own or "-") + (f" ({published})" if published else "")


def _success(summary: Mapping[str, Any] | None) -> str | None:
    rate = summary and summary["protocol"]["success"]
    return f"{100 * rate['rate']:.0f} %" if rate else None


def _published(config: Mapping[str, Any]) -> dict[str, str]:
    """What was published of a job at full size, by metric; several of one metric share a cell."""
    summary = {
        "protocol": {"name": config["protocol"]["name"]},
        "concept": config["concept"]["name"],
        "model": config["model"]["name"],
        "n": 0,
        "config": config,
    }
    found: dict[str, list[str]] = {}
    for number in published_numbers(summary):
        found.setdefault(number.metric, []).append(number.value)
    return {metric: ", ".join(values) for metric, values in found.items()}


def write_results(table: pd.DataFrame, folder: Path, *, smoke: bool) -> Path:
    """Write the table as Markdown; one in small has a name of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ("paper_smoke.md" if smoke else "paper.md")
    note = (
        "Share of prompts whose picture shows the concept, by the published protocols; in brackets what was published "
        "for Stable Diffusion 1.4, several numbers where papers disagree; docs/presets.md and experiments/results/"
        "published.csv say what each is to be doubted for."
    )
    size = "In small: these numbers of ours say that it runs, and nothing else. " if smoke else ""
    path.write_text(f"# The paper's benchmark\n\n{table.to_markdown(index=False)}\n\n{size}{note}\n", encoding="utf-8")
    return path
