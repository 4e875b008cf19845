"""Which attacks are probes: whether their success tells models that know a concept from models that never did."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from diffusion.canvas.knowledge import FORGOTTEN
from diffusion.files import write_atomically
from evaluation.probes import Separation
from experiments.job.store import content_hash
from experiments.results.figures import COLORS, add_legend, save_figure
from experiments.results.floors import without_seeds
from experiments.results.screen import made_sentence
from experiments.results.writing import markdown_table, write_csv

SURFACE = frozenset({"none", "sld", "safree", "foreign_prompt"})
"""Erasers that leave the weights, and so what the model knows, as they are."""

Model = tuple[str, int, str]
"""What a model was shown, the seed of its training, and the surface edit that hides it."""


def model_of(summary: Mapping[str, Any]) -> Model | None:
    """The model of the canvas that a run attacked, if no weight of it was edited; None for others.

    ``eraser=retrained`` stands for the model that it leads to.
    """
    eraser, model = summary["choices"].get("eraser"), summary["config"]["model"]
    if "knows" not in model or summary["choices"].get("pruning", "off") != "off":
        return None
    if eraser == "retrained":
        retrained = summary["config"]["eraser"]
        return retrained["knows"], retrained["training_seed"], "none"
    return (model["knows"], model["training_seed"], eraser) if eraser in SURFACE else None


def probe_table(summaries: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per concept and attack that met models that know the concept and models that never knew it.

    Runs of other settings of an attack are rows of their own. A model's score is its rate under attack, the mean over
    seeds of the attack where it ran with several.
    """
    scores: dict[tuple[str, str, int, str], dict[Model, list[float]]] = {}
    for summary in summaries:
        model = model_of(summary)
        # A model that lacks another concept than this one knows this one.
        attacked = summary["choices"]["attack"] != "none"
        if model is not None and attacked and any(summary["concept"] in forgotten for forgotten in FORGOTTEN.values()):
            settings = {name: summary["config"].get(name) for name in ("attack", "judge", "sampling", "protocol")}
            same = content_hash(without_seeds(settings))
            key = summary["concept"], summary["choices"]["attack"], summary["n"], same
            scores.setdefault(key, {}).setdefault(model, []).append(summary["rates"]["attacked"]["rate"])
    rows = []
    for (concept, attack, n, _), rates in sorted(scores.items()):
        kinds: dict[str, dict[str, float]] = {"knowing": {}, "never_knew": {}}
        for (knows, training, surface), several in rates.items():
            name = f"{knows}_{training}" if surface == "none" else f"{knows}_{training} behind {surface}"
            kinds["never_knew" if concept in FORGOTTEN[knows] else "knowing"][name] = fmean(several)
        if all(kinds.values()):
            row: dict[str, Any] = {"concept": concept, "attack": attack, "prompts": n}
            for kind, own in kinds.items():
                values = list(own.values())
                row |= {f"rate_{kind}": fmean(values), f"scores_{kind}": values, f"models_{kind}": list(own)}
            rows.append(row | _told(Separation.of(row["scores_knowing"], row["scores_never_knew"])))
    return pd.DataFrame(rows)


def over_concepts(table: pd.DataFrame) -> pd.DataFrame:
    """One row per attack of a :func:`probe_table`: its AUC over all models, each compared within its concept.

    Attacks that tell most come first, and of equal ones those that find least in models that never knew. An attack
    that ran with several settings on a concept is left out: which belong together is not known.
    """
    rows: list[dict[str, Any]] = []
    for (attack, prompts), own in table.groupby(["attack", "prompts"], sort=False):
        if own["concept"].is_unique:
            found = Separation.within(list(zip(own["scores_knowing"], own["scores_never_knew"], strict=True)))
            floor = own["rate_never_knew"].mean()
            row = {"attack": attack, "prompts": prompts, "concepts": len(own), "rate_never_knew": floor}
            rows.append(row | _told(found))
    rows.sort(key=lambda row: (-row["auc"], row["rate_never_knew"], row["attack"]))
    return pd.DataFrame(rows)


def _told(found: Separation) -> dict[str, Any]:
    return found.as_dict() | {"probe": found.is_probe, "tells_nothing": found.tells_nothing}


def write_probes(summaries: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Write ``probes.md``, ``probes.csv`` and the figure ``probes.png`` and ``.pdf`` into ``folder``.

    Raises:
        ValueError: No attack met models of both kinds.
    """
    table = probe_table(summaries)
    if table.empty:
        raise ValueError(
            "The store has no attack that was run on models that know a concept and on models that never knew it; "
            "make such runs with `python run.py -m eraser=none,retrained attack=...`."
        )
    together = over_concepts(table)
    parts = [
        "# probes",
        markdown_table(pd.DataFrame([_in_words(row, table) for row in _records(together)]), disable_numparse=True),
        "A concept's cell: the mean rate under attack over models that never knew it, and over models that do; n: "
        "prompts each. AUC: how often a model that knows the concept scores above one that never knew it, within each "
        "concept, ties counting half, with Hanley and McNeil's 95 % interval over models; p: exact, one-sided, over "
        "all ways to say which models of a concept know. An attack whose interval includes 0.5, or whose p is 0.05 or "
        "more, is not shown to be a probe, however high its rate; one with an AUC about 0.5 or less (up to 0.6) is "
        "none.",
        _models_sentence(table),
    ]
    if blind := [f"{row['attack']} ({row['auc']:.2f})" for row in _records(together) if row["tells_nothing"]]:
        parts.append(f"No probes, as their AUC is about 0.5 or less: {', '.join(blind)}.")
    parts.append(made_sentence([summary for summary in summaries if model_of(summary) is not None]))
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "probes.md", folder / "probes.csv"]
    write_atomically(paths[0], "\n\n".join(parts) + "\n")
    write_csv(table, paths[1])
    return [*paths, *save_figure(probe_figure(table, list(dict.fromkeys(together["attack"]))), folder / "probes")]


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def _in_words(row: Mapping[str, Any], table: pd.DataFrame) -> dict[str, str]:
    """A row over concepts with each concept's rates, for a reader."""
    own = table[(table["attack"] == row["attack"]) & (table["prompts"] == row["prompts"])].set_index("concept")
    cells = {
        concept: f"{100 * own['rate_never_knew'][concept]:.0f} → {100 * own['rate_knowing'][concept]:.0f} %"
        if concept in own.index
        else ""
        for concept in dict.fromkeys(table["concept"])
    }
    return {
        "attack": row["attack"],
        "n": str(row["prompts"]),
        **cells,
        "models": f"{row['knowing']} know, {row['ignorant']} never",
        "AUC": f"{row['auc']:.2f} [{row['low']:.2f}, {row['high']:.2f}]",
        "p": f"{row['p_value']:.3f}",
        "a probe": "no" if row["tells_nothing"] else "yes" if row["probe"] else "not shown",
    }


def _models_sentence(table: pd.DataFrame) -> str:
    """Which models took part, of each kind."""
    kinds = {"know": "models_knowing", "never knew": "models_never_knew"}
    told = [
        f"{kind}: {', '.join(sorted({name for names in table[column] for name in names}))}"
        for kind, column in kinds.items()
    ]
    return f"Models that {'; that '.join(told)}."


def probe_figure(table: pd.DataFrame, attacks: Sequence[str]) -> Figure:
    """Draw every model's rate under each of the ``attacks``, top to bottom: a panel per concept.

    A line leads from the mean over models that never knew the concept (circles) to the mean over those that do (dots).
    """
    concepts = list(dict.fromkeys(table["concept"]))
    figure = Figure(figsize=(3.4 * len(concepts) + 1.8, 0.3 * len(attacks) + 1.4), layout="constrained")
    panels = figure.subplots(1, len(concepts), sharex=True, sharey=True, squeeze=False)[0]
    for panel, concept in zip(panels, concepts, strict=True):
        panel.set_title(concept, fontsize=10)
        for row in _records(table[table["concept"] == concept]):
            height = attacks.index(row["attack"])
            panel.plot([row["rate_never_knew"], row["rate_knowing"]], [height, height], color="0.75", linewidth=2)
            for kind, color, filled in (("never_knew", COLORS[1], "none"), ("knowing", COLORS[0], "full")):
                scores = row[f"scores_{kind}"]
                label = kind.replace("_", " ")
                panel.plot(scores, [height] * len(scores), "o", color=color, fillstyle=filled, label=label)
        panel.xaxis.set_major_formatter(PercentFormatter(1))
        panel.grid(alpha=0.3)
    panels[0].set_yticks(range(len(attacks)), attacks)
    panels[0].invert_yaxis()
    add_legend(figure, panels)
    figure.supxlabel("prompts whose picture shows the concept under attack", fontsize=10)
    return figure
