"""Figures of many runs, collected from the store: ``python -m experiments.figures attacks``."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from experiments.errors import one_sentence
from experiments.tables import collect_runs, comes_as_text, model_name, parse_arguments

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c564b")
"""Told apart by people who see fewer colours (Okabe and Ito), and a brown."""


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
    handles = {line.get_label(): line for panel in panels.flat for line in panel.get_lines()}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=9)
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


def main() -> None:
    """The command line."""
    arguments = parse_arguments("Draw an experiment's attack success rates against their cost.", experiment="attacks")
    with one_sentence():
        summaries, _ = collect_runs(arguments.experiment, arguments.overrides)
        arguments.folder.mkdir(parents=True, exist_ok=True)
        path = arguments.folder / f"{arguments.experiment}.png"
        cost_curves(summaries).savefig(path, dpi=130)
        print(path)


if __name__ == "__main__":
    main()
