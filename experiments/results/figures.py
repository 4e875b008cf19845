"""Figures of many runs: success against cost where there are several attacks, else against what is retained."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from diffusion.files import replacing
from evaluation.statistics import Rate
from experiments.results.floors import floor_decides
from experiments.results.names import method_name, model_name
from experiments.results.tables import comes_as_text

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c564b")
"""Told apart by people who see fewer colours (Okabe and Ito), and a brown."""

STAR = "#b8860b"
"""Of the model that never knew."""

Success = tuple[float, float, float]
"""Success under attack and the ends of its 95 % interval, as shares."""

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
    add_legend(figure, panels.flat)
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
    """Draw attack success against what is retained: a column per concept, a row per measure, a line per method.

    Every run is a point, with its 95 % interval. A method's line is its frontier: the lowest success at which it keeps
    so much; its name stands beside it. Where all runs have a floor, success is the excess over it, and a star is the
    model that never knew. An arrow points to where a method is better.
    """
    concepts = list(dict.fromkeys(summary["concept"] for summary in summaries))
    methods = list(dict.fromkeys(map(method_name, summaries)))
    above = all(floor_decides(summary) for summary in summaries)
    figure = Figure(figsize=(4.6 * len(concepts) + 0.8, 3.6 * len(RETAINED)), layout="constrained")
    panels = figure.subplots(len(RETAINED), len(concepts), sharex="row", sharey=True, squeeze=False)
    for row, (label, (retained, better)) in zip(panels, RETAINED.items(), strict=True):
        if better < 0:
            row[0].invert_xaxis()  # which all of the row share
        for panel, concept in zip(row, concepts, strict=True):
            panel.set_title(concept, fontsize=10)
            panel.set_xlabel(label, fontsize=9)
            panel.set_ylim(-0.5 if above else -0.02, 1.02)
            panel.margins(x=0.3)
            panel.xaxis.set_major_locator(MaxNLocator(6))
            panel.yaxis.set_major_formatter(PercentFormatter(1, symbol="" if above else "%"))
            panel.grid(alpha=0.3)
            own = [summary for summary in summaries if summary["concept"] == concept]
            places: list[tuple[str, str, tuple[float, float]]] = []
            for number, method in enumerate(methods):
                runs = [summary for summary in own if method_name(summary) == method]
                points = [(retained(run["measures"]), _success(run, above=above)) for run in runs]
                color = COLORS[number % len(COLORS)]
                if points:
                    places.append((method, color, _draw_tradeoff(panel, points, method, color, better)))
            if above:
                panel.axhline(0, color="0.4", linewidth=0.8)
                x = retained(own[0]["floor"]["measures"])
                panel.plot([x], [0], marker="*", markersize=15, color=STAR, linestyle="none", label="_retrained")
                # Off the line of the floor, which would strike it through.
                places.append(("retrained", STAR, (x, -0.07)))
                low = {"fontsize": 8, "color": "0.35", "va": "bottom"}
                panel.text(0.02, 0.02, "below 0: over-erased", transform=panel.transAxes, **low)
            _name_beside(panel, places)
            _point_to_better(panel, 0.02 if above else 0.0)
    what = (
        "excess over the floor under attack, points"
        if above
        else "prompts whose picture shows the concept under attack"
    )
    figure.supylabel(what, fontsize=10)
    return figure


def _success(summary: Mapping[str, Any], *, above: bool) -> Success:
    """A run's success under attack with its interval, shares: over the floor if ``above``."""
    if above:
        floor = summary["floor"]
        return floor["excess"] / 100, floor["low"] / 100, floor["high"] / 100
    rate = Rate(**summary["rates"]["attacked"])
    return rate.rate, rate.low, rate.high


def _name_beside(panel: Axes, places: Sequence[tuple[str, str, tuple[float, float]]]) -> None:
    """Write each name beside its place, in its color; names that would lie on one another move up."""
    bottom, top = panel.get_ylim()
    apart = 0.06 * (top - bottom)
    taken: list[float] = []
    for name, color, (x, y) in sorted(places, key=lambda place: place[2][1]):
        height = max([y, *(other + apart for other in taken if abs(other - y) < 10 * apart and other + apart > y)])
        taken.append(height)
        panel.annotate(
            name,
            (x, y),
            xytext=(8, 72 * 2.6 * (height - y) / (top - bottom)),
            textcoords="offset points",
            color=color,
            fontsize=8,
            va="center",
        )


def _point_to_better(panel: Axes, height: float) -> None:
    """Draw an arrow to where a method is better: to the right, where quality is high, and down to ``height``."""
    panel.annotate(
        "better",
        xy=(0.99, height),
        xytext=(0.88, height + 0.16),
        xycoords=panel.get_yaxis_transform(),
        ha="right",
        va="bottom",
        fontsize=8,
        color="0.35",
        arrowprops={"arrowstyle": "->", "color": "0.35"},
    )


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


def _draw_tradeoff(
    panel: Axes, points: Sequence[tuple[float, Success]], label: str, color: str, better: int
) -> tuple[float, float]:
    """Draw one method's runs and its frontier, and return the end of it that retains most."""
    x, y = [retained for retained, _ in points], [success for _, (success, _, _) in points]
    errors = [[at - low for _, (at, low, _) in points], [high - at for _, (at, _, high) in points]]
    panel.errorbar(x, y, yerr=errors, fmt="o", markersize=4, elinewidth=0.6, color=color, alpha=0.7, label="_")
    line = frontier(list(zip(x, y, strict=True)), better)
    panel.step(
        *zip(*line, strict=True), where="post", color=color, linewidth=1.4, marker="o", markersize=4, label=label
    )
    return line[0]


def add_legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """Name every line once, beside the panels."""
    lines = {str(line.get_label()): line for panel in panels for line in panel.get_lines()}
    named = {label: line for label, line in lines.items() if not label.startswith("_")}
    figure.legend(named.values(), named.keys(), loc="outside right upper", fontsize=9)


def write_figure(summaries: Sequence[Mapping[str, Any]], name: str, folder: Path) -> list[Path]:
    """Draw attack success rates into ``<name>.png`` and ``<name>.pdf`` in ``folder``; see the module."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = cost_curves if len({summary["choices"]["attack"] for summary in summaries}) > 1 else tradeoffs
    return save_figure(draw(summaries), folder / name)


def save_figure(figure: Figure, path: Path) -> list[Path]:
    """Write ``figure`` to ``path`` with the endings ``.png``, to look at, and ``.pdf``, to print; returns both."""
    # No suffix is replaced: names may have dots.
    paths = [path.with_name(f"{path.name}{suffix}") for suffix in (".png", ".pdf")]
    for each in paths:
        with replacing(each) as partial:
            figure.savefig(partial, dpi=130, format=each.suffix[1:])
    return paths
