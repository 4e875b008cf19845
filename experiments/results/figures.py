"""Figures of many runs: success against cost where there are several attacks, else against what is retained."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from diffusion.files import replacing
from evaluation.statistics import Rate
from experiments.results.names import method_name, model_name
from experiments.results.tables import comes_as_text

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c564b")
"""Told apart by people who see fewer colours (Okabe and Ito), and a brown."""

RETAINED: dict[str, tuple[Callable[[Mapping[str, Any]], float], int]] = {
    "retained accuracy (mean of style and subject)": (
        lambda measures: (measures["accuracy_style"]["rate"] + measures["accuracy_subject"]["rate"]) / 2,
        1,
    ),
    "FID between base and edited model": (lambda measures: measures["fid"], -1),
}
"""What trade-offs are drawn against, and whether more (1) or less (-1) of it is better."""


def cost_curves(summaries: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw attack success rate against U-Net evaluations per prompt: a panel per erased model, a line per attack.

    A line begins at the plain prompts' picture. Attacks that come down to a text are drawn through; those that need
    embeddings, noise or other weights, dashed.
    """
    models = list(dict.fromkeys(map(model_name, summaries)))
    concepts = len({summary["concept"] for summary in summaries})
    columns = max(1, len(models) // concepts)
    rows = -(-len(models) // columns)
    figure = Figure(figsize=(4.6 * columns + 2.4, 3.1 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    attacks = [name for name in dict.fromkeys(s["choices"]["attack"] for s in summaries) if name != "none"]
    for panel, model in zip(panels.flat, models, strict=False):
        panel.set_title(model, fontsize=10)
        for summary in summaries:
            if model_name(summary) == model and summary["choices"]["attack"] in attacks:
                _draw(panel, summary, attacks.index(summary["choices"]["attack"]))
        panel.set_xscale("log")
        panel.set_ylim(-0.02, 1.02)
        panel.yaxis.set_major_formatter(PercentFormatter(1))
        panel.grid(alpha=0.3)
    _add_legend(figure, panels.flat)
    figure.supxlabel("U-Net evaluations per prompt", fontsize=10)
    figure.supylabel("prompts whose picture shows the concept", fontsize=10)
    return figure


def _draw(panel: Axes, summary: Mapping[str, Any], number: int) -> None:
    """Draw the curve of the attack with this number."""
    points = [(point["unet_evaluations"] / summary["n"], point["rate"]) for point in summary["curve"]]
    panel.step(
        *zip(*points, strict=True),
        where="post",
        color=COLORS[number % len(COLORS)],
        linestyle="-" if comes_as_text(summary) else "--",
        marker="os"[number // len(COLORS) % 2],
        markersize=3,
        linewidth=1.2,
        label=summary["choices"]["attack"],
    )


def tradeoffs(summaries: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw attack success rate against what is retained: a column per concept, a row per measure, a line per method.

    Every run is a point, with the 95 % interval of its rate. A method's line is its frontier: the lowest rate at which
    it keeps so much.
    """
    concepts = list(dict.fromkeys(summary["concept"] for summary in summaries))
    methods = list(dict.fromkeys(map(method_name, summaries)))
    figure = Figure(figsize=(4.2 * len(concepts) + 2.0, 3.4 * len(RETAINED)), layout="constrained")
    panels = figure.subplots(len(RETAINED), len(concepts), sharex="row", sharey=True, squeeze=False)
    for row, (label, (retained, better)) in zip(panels, RETAINED.items(), strict=True):
        for panel, concept in zip(row, concepts, strict=True):
            panel.set_title(concept, fontsize=10)
            panel.set_xlabel(label, fontsize=9)
            panel.set_ylim(-0.02, 1.02)
            panel.yaxis.set_major_formatter(PercentFormatter(1))
            panel.grid(alpha=0.3)
            for number, method in enumerate(methods):
                runs = [s for s in summaries if (s["concept"], method_name(s)) == (concept, method)]
                points = [(retained(run["measures"]), Rate(**run["rates"]["attacked"])) for run in runs]
                _draw_tradeoff(panel, points, method, COLORS[number % len(COLORS)], better)
        if better < 0:
            row[0].invert_xaxis()  # which all of the row share
    _add_legend(figure, panels.flat)
    figure.supylabel("prompts whose picture shows the concept under attack", fontsize=10)
    return figure


def frontier(points: Sequence[tuple[float, float]], better: int) -> list[tuple[float, float]]:
    """The points that no other beats: as well retained and a lower rate, or better retained and as low a rate.

    Args:
        points: (retained, rate).
        better: 1 where more is better retained, -1 where less is.

    Returns:
        The best retained first.
    """
    best: list[tuple[float, float]] = []
    for retained, rate in sorted(points, key=lambda point: (-better * point[0], point[1])):
        if not best or rate < best[-1][1]:
            best.append((retained, rate))
    return best


def _draw_tradeoff(panel: Axes, points: Sequence[tuple[float, Rate]], label: str, color: str, better: int) -> None:
    """Draw one method's runs and its frontier."""
    if not points:
        return
    x, rates = [retained for retained, _ in points], [rate for _, rate in points]
    errors = [[rate.rate - rate.low for rate in rates], [rate.high - rate.rate for rate in rates]]
    y = [rate.rate for rate in rates]
    panel.errorbar(x, y, yerr=errors, fmt="o", markersize=4, elinewidth=0.6, color=color, alpha=0.7, label="_")
    line = frontier(list(zip(x, y, strict=True)), better)
    panel.step(
        *zip(*line, strict=True), where="post", color=color, linewidth=1.4, marker="o", markersize=4, label=label
    )


def _add_legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """Name every line once, beside the panels."""
    lines = {str(line.get_label()): line for panel in panels for line in panel.get_lines()}
    named = {label: line for label, line in lines.items() if not label.startswith("_")}
    figure.legend(named.values(), named.keys(), loc="outside right upper", fontsize=9)


def write_figure(summaries: Sequence[Mapping[str, Any]], name: str, folder: Path) -> Path:
    """Draw attack success rates into ``<name>.png`` in ``folder``; see the module."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    draw = cost_curves if len({summary["choices"]["attack"] for summary in summaries}) > 1 else tradeoffs
    with replacing(path) as partial:
        draw(summaries).savefig(partial, dpi=130)
    return path
