"""A workspace and a report of W&B over runs that :mod:`experiments.results.tracking` records; with wandb-workspaces."""

from collections.abc import Sequence
from typing import Any

from wandb_workspaces import expr, workspaces
from wandb_workspaces.reports import v2 as reports

CHOICES = ("eraser", "pruning", "attack")
"""What success rates are shown over, each a value of a run's config."""

BESIDE = ("retained_style", "retained_subject", "retained_clip_score", "retained_fid")
"""What erasing costs elsewhere, numbers of a run's summary."""

COLUMNS = (
    *("summary:asr", "summary:asr_floor", "summary:excess", "summary:erased", "summary:retained_style"),
    *(f"config:{name}.value" for name in (*CHOICES, "concept", "seed")),
)


def make_workspace(entity: str, project: str, name: str, concept: str | None = None) -> Any:
    """A ``wandb_workspaces.workspaces.Workspace``, not yet saved.

    Args:
        entity: Team or user whose project it is.
        project: The runs'.
        name: Its title.
        concept: Whose runs alone are shown.
    """
    sections = [
        workspaces.Section("Success of attacks", panels=success_panels(), is_open=True),
        workspaces.Section("Trade-off: success against what else suffers", panels=trade_off_panels(), is_open=True),
        workspaces.Section("Curves", panels=curve_panels(), is_open=True),
        workspaces.Section("Pictures", panels=gallery_panels(), is_open=True),
    ]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=sections,
        runset_settings=workspaces.RunsetSettings(
            filters=[expr.Config("concept") == concept] if concept else [],
            groupby=[expr.Config(choice) for choice in CHOICES],
            pinned_columns=list(COLUMNS),
        ),
    )


def make_report(
    entity: str, project: str, title: str, tables: Sequence[tuple[str, str]], concept: str | None = None
) -> Any:
    """A ``wandb_workspaces.reports.v2.Report``, not yet saved.

    Args:
        entity: Team or user whose project it is.
        project: The runs'.
        title: At its top.
        tables: Names of tables and what they say, in Markdown.
        concept: Whose runs alone are charted.
    """
    filters = [expr.Config("concept") == concept] if concept else ""
    charts = {
        "Success of attacks": success_panels(),
        "Trade-off": trade_off_panels(),
        "Curves": curve_panels(),
        "Pictures": gallery_panels(),
    }
    blocks: list[Any] = [reports.TableOfContents()]
    for name, table in tables:
        blocks += [reports.H2(name), reports.MarkdownBlock(table)]
    for name, panels in charts.items():
        # Panels of 12 of a report's 24 columns, two in a row.
        for number, panel in enumerate(panels):
            panel.layout = reports.Layout(x=12 * (number % 2), y=8 * (number // 2), w=12, h=8)
        runs = reports.Runset(
            entity, project, name="runs", filters=filters, groupby=[f"config.{choice}" for choice in CHOICES]
        )
        blocks += [reports.H2(name), reports.PanelGrid(runsets=[runs], panels=panels)]
    return reports.Report(project=project, entity=entity, title=title, blocks=blocks, width="fluid")


def success_panels() -> list[Any]:
    """Success rates over each choice and over all at once, with the floor."""
    bars = [
        reports.BarPlot(
            title=f"Attack success over {choice} (mean; range over runs)",
            metrics=["asr"],
            groupby=reports.Config(choice),
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
            range_x=(0, 1),
        )
        for choice in (*CHOICES, "combination")
    ]
    columns = [
        *(reports.ParallelCoordinatesPlotColumn(reports.Config(choice)) for choice in CHOICES),
        *(reports.ParallelCoordinatesPlotColumn(reports.SummaryMetric(name)) for name in ("erased", "asr", "excess")),
    ]
    floor = reports.BarPlot(
        title="Success, and that on a model that never knew the concept",
        metrics=["asr", "asr_floor"],
        groupby=reports.Config("combination"),
        groupby_aggfunc="mean",
        range_x=(0, 1),
    )
    return [
        *bars,
        floor,
        reports.ParallelCoordinatesPlot(title="eraser x pruning x attack", columns=columns),
    ]


def trade_off_panels() -> list[Any]:
    """Success under attack against each measure of what is kept."""
    return [
        reports.ScatterPlot(
            title=f"Attack success (lower is better) against {name.replace('_', ' ')}",
            x=reports.SummaryMetric(name),
            y=reports.SummaryMetric("asr"),
            range_y=(0, 1),
        )
        for name in BESIDE
    ]


def curve_panels() -> list[Any]:
    """What a job tells while it runs, and the attack's curve."""
    drawn = (
        ("Success over attempts", "attack/attempts", "attack/success_rate"),
        ("Success over U-Net evaluations", "attack/unet_evaluations", "attack/success_rate"),
        ("The attack under way: success so far", "attack/prompts", "attack/so_far"),
        ("The eraser's loss", "eraser/step", "eraser/loss"),
    )
    return [
        reports.LinePlot(
            title=title, x=x, y=[y], max_runs_to_show=50, smoothing_factor=0.9 if y == "eraser/loss" else 0
        )
        for title, x, y in drawn
    ]


def gallery_panels() -> list[Any]:
    """The picture grid of every run, and the table of prompts."""
    return [
        reports.MediaBrowser(title="Base, erased and attacked", media_keys=["pictures"], num_columns=2),
        reports.WeavePanelSummaryTable(table_name="prompts"),
    ]
