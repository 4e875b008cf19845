"""Neurons that go with a concept, once it is erased and under attack."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter
from pydantic import Field
from torch import Tensor

from attacks.prompt_pairs import Pair, read_pairs
from attacks.transfer import FILE_NAME, FoundPrompt, read_found
from diffusion.checked import checked
from diffusion.files import write_atomically
from diffusion.model import TextToImage
from diffusion.source_code import code_reached
from diffusion.streams import stream
from erasure.neurons import Sensitivity, Spread, Units, activations, choose, standardised_differences
from erasure.trajectories import remembered
from evaluation.prompt_sets import PromptRow
from evaluation.statistics import Mean
from experiments.job.drawing import stored_edit
from experiments.job.origin import computing_threads
from experiments.job.remote_store import fetch, open_store
from experiments.job.settings import Job
from experiments.job.stages import Stages
from experiments.job.store import canonical_json
from experiments.job.summary import pruning_pairs
from experiments.results.figures import COLORS, save_figure
from experiments.results.names import GROUPS
from experiments.results.tables import comes_as_text
from experiments.results.writing import markdown_table, write_csv

log = logging.getLogger(__name__)

SITUATIONS = {"original": "original model", "erased": "erased, plain prompt", "attacked": "erased, under attack"}
"""Fields of :class:`Sensitivity` in a reader's words."""

GROUP_COLORS = {"correlated": COLORS[1], "random": COLORS[0]}
SUBSET_MARKERS = {"broken": ("^", "full", "attack succeeded"), "held": ("v", "none", "attack failed")}

Picture = tuple[str, int, float]
"""What a picture is made of: prompt, seed, guidance scale."""


@checked
class Analysis:
    """What is asked of the neurons.

    Attributes:
        units: What counts as a neuron.
        spread: What a difference between matched prompts is standardised by.
        percent: How many of 100 neurons count as correlated with the concept, and how many random ones stand beside.
        seeds_per_pair: Pictures of every pair of prompts that the neurons are chosen on.
        seed: Of those pictures, of the random neurons and of the bootstrap.
    """

    units: Units = "feed_forward"
    spread: Spread = "paired"
    percent: Annotated[float, Field(gt=0, le=50)] = 2.0
    seeds_per_pair: Annotated[int, Field(ge=1)] = 2
    seed: Annotated[int, Field(ge=0)] = 0


@dataclasses.dataclass(frozen=True)
class RunNeurons:
    """The neurons of the model that one run erased and attacked.

    Attributes:
        summary: The run's.
        groups: ``correlated`` and ``random``, each on every prompt of the run.
        absent: Of each of their neurons, its activation without the concept as a multiple of that with it, float64
            [neurons]; in the original model, on the pairs that the neurons were chosen on.
        tried: bool [n], prompts that the attack began on; the others showed the concept as they stood.
        broken: bool [n], those of them that it brought the concept back on.
        pairs: Pairs of pictures that the neurons were chosen on.
    """

    summary: Mapping[str, Any]
    groups: dict[str, Sensitivity]
    absent: dict[str, Tensor]
    tried: Tensor
    broken: Tensor
    pairs: int

    @property
    def subsets(self) -> dict[str, Tensor]:
        """Prompts by what the attack came to, bool [n]; those without a prompt are left out."""
        subsets = {"attacked": self.tried, "broken": self.broken, "held": self.tried & ~self.broken}
        return {name: rows for name, rows in subsets.items() if bool(rows.any())}


class Measurements:
    """Measures the neurons of finished runs; what was measured before is found in their store.

    Args:
        analysis: What is asked.
        job_of: The job of a summary, built again from its config.
    """

    def __init__(self, analysis: Analysis, job_of: Callable[[Mapping[str, Any]], Job]) -> None:
        self.analysis = analysis
        self._job_of = job_of
        self._models: dict[str, TextToImage] = {}

    def of(self, summary: Mapping[str, Any]) -> RunNeurons:
        """Measure the neurons of one run's model.

        Raises:
            ValueError: What the attack found is no text, it attacked no prompt, the concept has no pairs of prompts
                besides those that are measured, or an artefact is damaged.
            FileNotFoundError: An artefact of the run is gone.
        """
        run, attack = summary["run"], summary["choices"]["attack"]
        if not comes_as_text(summary):
            raise ValueError(
                f"Run {run} under {attack} ended with more than a text, which is not kept; choose attacks that come "
                "down to prompts (unlearndiff, p4d, random, ...)."
            )
        tried = torch.tensor([not case["erased"] for case in summary["cases"]])
        if not bool(tried.any()):
            raise ValueError(f"Run {run} attacked no prompt: all showed the concept as they stood.")
        job = self._job_of(summary)
        folder = Path(summary["path"]).parent
        store = open_store(folder.parents[1])
        edit = stored_edit(store.root, summary["artefacts"]["edit"])
        if bool(edit) and edit.fingerprint()[:16] != summary["edit"]["content"]:
            raise ValueError(f"The edit of run {run} was made anew since, and differs; repeat the run's command.")
        fetch(folder)
        found = read_found(folder / FILE_NAME)
        stages = Stages(job, store, self._model(job))

        plain: list[Picture] = [(row.prompt, row.seed, row.guidance) for row in job.prompts]
        adversarial = [_adversarial(found[row.case_number], row) for row in job.prompts]
        pairs = self._pairs(job)
        with computing_threads(stages.model, job.settings.threads):
            chosen_on = self._pairs_measured(stages, pairs)
            original = self._activations(stages, plain, "none")
            with edit.applied(stages.model, fingerprint=stages.model_key["weights"]):
                erased = self._activations(stages, plain, edit.fingerprint())
                attacked = self._activations(stages, adversarial, edit.fingerprint())

        active = (original.mean(0) > 0) & (chosen_on["present"] > 0)
        chosen = choose(chosen_on["correlation"], active, percent=self.analysis.percent, seed=self.analysis.seed)
        groups = dict(zip(("correlated", "random"), chosen, strict=True))
        absent = chosen_on["absent"] / chosen_on["present"]
        return RunNeurons(
            summary,
            {
                name: Sensitivity.of(*(values[:, of] for values in (original, erased, attacked)))
                for name, of in groups.items()
            },
            {name: absent[of] for name, of in groups.items()},
            tried,
            tried & torch.tensor([case["attacked"] for case in summary["cases"]]),
            len(pairs),
        )

    def _model(self, job: Job) -> TextToImage:
        name = canonical_json(job.config["model"])
        if name not in self._models:
            self._models[name] = job.model.load()
        return self._models[name]

    def _pairs(self, job: Job) -> list[Pair]:
        """The concept's pairs of prompts, as often as each has pictures, without those that are measured later."""
        if job.concept.pairs is None:
            raise ValueError(
                f"concept.pairs of {job.concept.name!r} is null; neurons are chosen on a CSV file with the columns "
                "with,without."
            )
        measured = {row.prompt for row in job.prompts}
        pairs = [pair for pair in read_pairs(job.concept.pairs) if measured.isdisjoint(pair)]
        pairs *= self.analysis.seeds_per_pair
        if len(pairs) < 2:
            raise ValueError(
                f"{job.concept.pairs} has {len(pairs)} pairs besides the prompts that are measured; neurons are chosen "
                "on 2 or more."
            )
        return pairs

    def _pairs_measured(self, stages: Stages, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        """Of the unedited model, float64 [neurons]: ``correlation``, mean activations ``present`` and ``absent``."""
        seeds = torch.randint(2**31, (len(pairs),), generator=stream(self.analysis.seed, "neurons/pairs")).tolist()
        guidance = stages.job.prompts[0].guidance
        pictures: list[list[Picture]] = [
            [(prompt, seed, guidance) for prompt, seed in zip(prompts, seeds, strict=True)]
            for prompts in zip(*pairs, strict=True)
        ]

        def compute() -> dict[str, Tensor]:
            present, absent = (self._measure(stages, side) for side in pictures)
            return {
                "correlation": standardised_differences(present, absent, spread=self.analysis.spread),
                "present": present.double().mean((0, 1)),
                "absent": absent.double().mean((0, 1)),
            }

        return self._remembered(stages, {"pairs": pictures, "spread": self.analysis.spread}, "none", compute)

    def _activations(self, stages: Stages, pictures: Sequence[Picture], edit: str) -> Tensor:
        """Means over timesteps, float [n, neurons], of the model as it is now, with the edit of hash ``edit``."""

        def compute() -> dict[str, Tensor]:
            return {"activations": self._measure(stages, pictures).mean(1)}

        return self._remembered(stages, {"pictures": pictures}, edit, compute)["activations"]

    def _measure(self, stages: Stages, pictures: Sequence[Picture]) -> Tensor:
        prompts, seeds, guidance = zip(*pictures, strict=True)
        sampling = stages.job.settings.sampling
        return activations(
            stages.model,
            prompts,
            seeds=seeds,
            guidance=guidance,
            steps=sampling.steps,
            batch_size=sampling.batch_size,
            units=self.analysis.units,
        )

    def _remembered(
        self, stages: Stages, key: Mapping[str, object], edit: str, compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        key = {"model": stages.model_key, "edit": edit, "units": self.analysis.units, **stages.sampler_key, **key}
        key["code"] = code_reached(activations.__module__)
        folder = stages.store.folder("neurons", key)
        with stages.store.locked(folder):
            tensors, spent = remembered(folder / "neurons", "pt", compute, stages.model)
        log.info("neurons: %s (%d U-Net evaluations)", folder, spent)
        return {name: value.cpu() for name, value in tensors.items()}


def _adversarial(found: FoundPrompt, row: PromptRow) -> Picture:
    return found.adversarial_prompt, row.seed if found.seed is None else found.seed, row.guidance


def names(run: RunNeurons) -> dict[str, Any]:
    """Which model it is, in the columns of tables."""
    choices = {group: run.summary["choices"].get(group, "") for group in GROUPS}
    return {"concept": run.summary["concept"]} | choices | {"seed": run.summary["seed"]}


def long_table(runs: Sequence[RunNeurons], analysis: Analysis) -> pd.DataFrame:
    """One row per run, group of neurons and subset of its prompts; means have their interval over the prompts.

    Activations are multiples of a neuron's mean over all plain prompts in the original model; ``_q25`` and ``_q75`` are
    quartiles of the neurons.
    """
    rows = []
    for run in runs:
        for group, every in run.groups.items():
            for subset, which in run.subsets.items():
                part = every.on(which)
                row = names(run) | {"neurons": group, "neurons_n": part.original.shape[1]}
                row |= {"prompts": subset, "n": len(part.original), "pairs_n": run.pairs}
                row |= {"absent": float(run.absent[group].mean())}
                for name in SITUATIONS:
                    values: Tensor = getattr(part, name)
                    row |= _numbers(name, Mean.bootstrapped(values.mean(1), seed=analysis.seed))
                    quartiles = values.mean(0).quantile(values.new_tensor([0.25, 0.75])).tolist()
                    row |= dict(zip((f"{name}_q25", f"{name}_q75"), quartiles, strict=True))
                row |= _numbers("reactivation", Mean.bootstrapped(part.reactivation, seed=analysis.seed))
                row["attacked_over_erased"] = float(part.attacked.mean() / part.erased.mean())
                row |= {f"analysis_{name}": value for name, value in vars(analysis).items()}
                rows.append(row | {"run": run.summary["run"], "path": run.summary["path"]})
    return pd.DataFrame(rows)


def reading_table(numbers: pd.DataFrame) -> pd.DataFrame:
    """The same for readers: percent with intervals as text, without the settings."""
    columns = {name: numbers[name] for name in ("concept", *GROUPS, "seed", "neurons", "prompts", "n")}
    columns["without the concept"] = numbers["absent"].map(lambda level: f"{100 * level:.0f} %")
    for name, label in {**SITUATIONS, "reactivation": "reactivation"}.items():
        cells = numbers[["n", name, f"{name}_low", f"{name}_high"]].itertuples(index=False, name=None)
        sign = "+" if name == "reactivation" else ""
        columns[label] = pd.Series([_percent(Mean(*cell), sign=sign) for cell in cells])
    columns["run"] = numbers["run"]
    return pd.DataFrame(columns)


@dataclasses.dataclass(frozen=True)
class PruningEffect:
    """How far neurons come back under attack, without and with pruning; means over prompts with bootstrap intervals.

    A prompt's value is the reactivation of a group of neurons, in units of their activation in the original model.

    Attributes:
        pruned_run: The run with pruning.
        groups: By ``off`` or ``on``, what pruning is, and group; over the prompts that the attack began on.
        excess: By ``off`` or ``on``: correlated minus random, prompt by prompt, over the same prompts.
        difference: The excess without pruning minus that with it, over the prompts that the attack began on in both.
    """

    pruned_run: RunNeurons
    groups: dict[tuple[str, str], Mean]
    excess: dict[str, Mean]
    difference: Mean

    @classmethod
    def of(cls, pruned: RunNeurons, unpruned: RunNeurons, *, seed: int) -> "PruningEffect | None":
        """Compare two runs of the same prompts; None if there is no prompt that the attack began on in both."""
        both = pruned.tried & unpruned.tried
        if not bool(both.any()):
            return None
        runs = {"off": unpruned, "on": pruned}
        excess = {
            pruning: run.groups["correlated"].reactivation - run.groups["random"].reactivation
            for pruning, run in runs.items()
        }
        return cls(
            pruned,
            groups={
                (pruning, name): Mean.bootstrapped(group.reactivation[run.tried], seed=seed)
                for pruning, run in runs.items()
                for name, group in run.groups.items()
            },
            excess={pruning: Mean.bootstrapped(excess[pruning][run.tried], seed=seed) for pruning, run in runs.items()},
            difference=Mean.bootstrapped((excess["off"] - excess["on"])[both], seed=seed),
        )

    @property
    def verdict(self) -> str:
        """What the intervals say of the claim: correlated neurons come back without pruning, and not with it."""
        if self.groups["off", "correlated"].low <= 0:
            return "not shown: without pruning the correlated neurons do not come back"
        if self.excess["off"].low <= 0:
            return "not shown: without pruning the correlated neurons come back no more than random ones"
        if self.difference.low <= 0:
            return "not shown: with pruning the correlated neurons come back no less"
        return "shown" if self.excess["on"].low <= 0 else "in part: with pruning the correlated neurons come back less"


def pruning_effects(runs: Sequence[RunNeurons], *, seed: int) -> list[PruningEffect]:
    """Every pair of runs that differ in pruning alone."""
    by_run = {run.summary["run"]: run for run in runs}
    pairs = pruning_pairs([run.summary for run in runs])
    effects = [PruningEffect.of(by_run[on["run"]], by_run[off["run"]], seed=seed) for on, off in pairs]
    return [effect for effect in effects if effect is not None]


def effects_table(effects: Sequence[PruningEffect]) -> pd.DataFrame:
    """One row per pair of runs, for readers."""
    rows = []
    for effect in effects:
        row = {name: value for name, value in names(effect.pruned_run).items() if name != "pruning"}
        row["n in both"] = effect.difference.n
        for pruning, excess in effect.excess.items():
            for group in GROUP_COLORS:
                row[f"{pruning}: {group}"] = _percent(effect.groups[pruning, group], sign="+")
            row[f"{pruning}: difference"] = _percent(excess, sign="+")
        row["off minus on"] = _percent(effect.difference, sign="+")
        rows.append(row | {"the claim": effect.verdict})
    return pd.DataFrame(rows)


def write_results(
    runs: Sequence[RunNeurons], analysis: Analysis, name: str, folder: Path, *, missing: Sequence[str] = ()
) -> list[Path]:
    """Write ``<name>.md``, ``.csv`` and ``.png`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = long_table(runs, analysis)
    effects = pruning_effects(runs, seed=analysis.seed)
    unit = {"feed_forward": "hidden units of feed-forwards", "cross_attention": "outputs of cross-attention"}
    parts = [
        f"# {name}",
        f"Neurons: {unit[analysis.units]}. Correlated: the {analysis.percent:g} % with the largest standardised "
        f"difference ({analysis.spread}) of activation between {max(run.pairs for run in runs)} pictures of prompts "
        "with the concept and as many of the same prompts without it, from the same noise, in the original model, "
        "so more active with it; random: as many others. The pairs are none of the prompts below. "
        f"Seed {analysis.seed}.",
    ]
    if effects:
        parts += [
            "## Do the correlated neurons come back under attack?",
            markdown_table(effects_table(effects)),
            "The claim: with pruning off they do, more than random ones, and with pruning on they do not. Numbers are "
            "reactivations: activation under attack minus that on the plain prompt, both in the erased model, in "
            "percent of the neuron's activation in the original model; difference: correlated minus random. Bootstrap "
            "95 % intervals over the prompts that the attack began on (off minus on: that it began on in both, prompt "
            "by prompt). Erasure and random neurons are one draw each: the intervals say nothing of others.",
        ]
    parts += [
        "## Activations",
        markdown_table(reading_table(numbers)),
        "In percent of the neurons' mean activation on all plain prompts in the original model; means over neurons, "
        "timesteps and prompts with bootstrap 95 % intervals over prompts. Prompts: `attacked` are those whose picture "
        "did not show the erased concept already, `broken` those that the attack then brought it back on, `held` the "
        "rest. Without the concept: the original model on the pairs, without against with; the neurons were chosen on "
        "them, so it is a little low for the correlated ones.",
    ]
    if missing:
        parts += [f"{len(missing)} runs are missing: {'; '.join(missing)}."]
    paths = [folder / f"{name}{suffix}" for suffix in (".md", ".csv")]
    write_atomically(paths[0], "\n\n".join(parts) + "\n")
    write_csv(numbers, paths[1])
    return [*paths, *save_figure(draw(runs, numbers), folder / name)]


def draw(runs: Sequence[RunNeurons], numbers: pd.DataFrame) -> Figure:
    """A row per task and seed: a panel per erased model, and one that compares what the attack brings back in each.

    Args:
        runs: What to draw.
        numbers: Their :func:`long_table`.
    """
    tasks: dict[tuple[str, int], list[RunNeurons]] = {}
    for run in runs:
        tasks.setdefault((run.summary["concept"], run.summary["seed"]), []).append(run)
    columns = max(map(len, tasks.values()))
    figure = Figure(figsize=(3.9 * columns + 3.0, 3.0 * len(tasks) + 0.9), layout="constrained")
    panels = figure.subplots(len(tasks), columns + 1, squeeze=False, width_ratios=[*[1.0] * columns, 0.75])
    for panel in panels[:, :-1].flat:
        panel.sharey(panels[0, 0])
    for panel in panels[:, -1]:
        panel.sharey(panels[0, -1])
    for row, same in zip(panels, tasks.values(), strict=True):
        for panel, run in zip(row, same, strict=False):
            _draw_situations(panel, run, numbers[numbers["run"] == run.summary["run"]])
        for empty in row[len(same) : columns]:
            empty.set_axis_off()
        _draw_reactivation(row[-1], same, numbers)
    for panel in panels.flat:
        panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        panel.grid(axis="y", alpha=0.3)
    figure.legend(handles=_legend(), loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    figure.supylabel("activation (original model, plain prompts = 100 %)", fontsize=10)
    return figure


def _draw_situations(panel: Axes, run: RunNeurons, numbers: pd.DataFrame) -> None:
    """Draw one model: groups of neurons from the original model over the plain prompts to the attack."""
    places = list(range(len(SITUATIONS)))
    for group, color in GROUP_COLORS.items():
        rows = numbers[numbers["neurons"] == group].set_index("prompts")
        every = rows.loc["attacked"]
        means = [every[name] for name in SITUATIONS]
        ends = [[abs(every[f"{name}_{end}"] - every[name]) for name in SITUATIONS] for end in ("low", "high")]
        quartiles = ([every[f"{name}_{end}"] for name in SITUATIONS] for end in ("q25", "q75"))
        panel.fill_between(places, *quartiles, color=color, alpha=0.13, linewidth=0)
        panel.errorbar(places, means, ends, color=color, marker="o", markersize=4, linewidth=1.6, capsize=3)
        panel.axhline(every["absent"], color=color, linestyle=":", linewidth=1.2)
        for subset, (marker, fill, _) in SUBSET_MARKERS.items():
            if subset in rows.index:
                value = rows.loc[subset, "attacked"]
                panel.plot(places[-1] + 0.2, value, marker, color=color, fillstyle=fill, markersize=6)
    broken, tried = int(run.broken.sum()), int(run.tried.sum())
    label = names(run)
    panel.set_title(
        f"{label['concept']}: {label['eraser']}, pruning {label['pruning']}, seed {label['seed']}\n"
        f"{label['attack']} broke {broken} of {tried} prompts",
        fontsize=9,
    )
    panel.set_xticks(places, [name.replace(", ", ",\n") for name in SITUATIONS.values()], fontsize=8)
    panel.set_xlim(-0.25, places[-1] + 0.45)


def _draw_reactivation(panel: Axes, runs: Sequence[RunNeurons], numbers: pd.DataFrame) -> None:
    """Draw what the attack adds, a place per model."""
    panel.axhline(0, color="black", linewidth=0.8)
    for place, run in enumerate(runs):
        rows = numbers[(numbers["run"] == run.summary["run"]) & (numbers["prompts"] == "attacked")]
        for (_, row), shift in zip(rows.iterrows(), (-0.1, 0.1), strict=True):
            mean = row["reactivation"]
            ends = [[mean - row["reactivation_low"]], [row["reactivation_high"] - mean]]
            color = GROUP_COLORS[row["neurons"]]
            panel.errorbar(place + shift, mean, ends, color=color, marker="o", markersize=4, capsize=3)
    panel.set_xticks(range(len(runs)), [f"{names(run)['eraser']},\npruning {names(run)['pruning']}" for run in runs])
    panel.tick_params(axis="x", labelsize=8)
    panel.set_xlim(-0.5, len(runs) - 0.5)
    panel.set_title("reactivation: under attack\nminus plain prompt", fontsize=9)


def _legend() -> list[Line2D]:
    groups = [
        Line2D([], [], color=color, marker="o", markersize=4, label=f"{name} neurons: mean, 95 % interval over prompts")
        for name, color in GROUP_COLORS.items()
    ]
    subsets = [
        Line2D([], [], color="black", linestyle="", marker=marker, fillstyle=fill, label=f"prompts: {label}")
        for marker, fill, label in SUBSET_MARKERS.values()
    ]
    without = Line2D([], [], color="black", linestyle=":", label="original model without the concept")
    band = Line2D([], [], color="black", alpha=0.13, linewidth=7, label="middle half of the neurons")
    return [*groups, *subsets, without, band]


def _numbers(name: str, mean: Mean) -> dict[str, float]:
    return {name: mean.mean, f"{name}_low": mean.low, f"{name}_high": mean.high}


def _percent(mean: Mean, *, sign: str = "") -> str:
    return f"{100 * mean.mean:{sign}.0f} % [{100 * mean.low:{sign}.0f}, {100 * mean.high:{sign}.0f}]"
