"""Geometry of the page's pictures; the templates draw it as SVG."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.statistics import Rate, wilson_interval
from experiments.results.figures import RETAINED, frontier
from experiments.results.report.verdict import is_attacked, rate_of
from experiments.results.report.words import concept_name

_LINEAR_UP_TO = 30
_LOG_TICKS = (0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000)


@dataclass(frozen=True)
class Frame:
    """Where in an SVG the data goes, in its user units."""

    width: float = 440
    height: float = 250
    left: float = 46
    right: float = 14
    top: float = 14
    bottom: float = 44

    def x(self, share: float) -> float:
        """Of a share of the width, 0 to 1."""
        return round(self.left + share * (self.width - self.left - self.right), 1)

    def y(self, rate: float) -> float:
        """Of a rate, 0 to 1."""
        return round(self.height - self.bottom - rate * (self.height - self.top - self.bottom), 1)


SMALL = Frame(width=220, height=140, left=34, right=8, top=8, bottom=22)


@dataclass(frozen=True)
class Curve:
    """Success over the attack's pictures per prompt, as steps.

    Attributes:
        frame: Where it is drawn.
        line: The path of the rate.
        band: The path around its 95 % interval.
        ticks: Places and texts along x.
        end: Where the line ends.
        rate: There.
        evaluations: Per prompt, at the end.
        levels: Horizontal lines for comparison: name and y.
    """

    frame: Frame
    line: str
    band: str
    ticks: list[tuple[float, str]]
    end: tuple[float, float]
    rate: float
    evaluations: float
    levels: list[tuple[str, float]]


def attack_curve(summary: Mapping[str, Any], frame: Frame | None = None, attempts: int | None = None) -> Curve | None:
    """The curve of a run's attack; None where there was none.

    Args:
        summary: Of the run.
        frame: Where it is drawn.
        attempts: How far the axis goes; as far as the curve if None.
    """
    frame, points = frame or Frame(), summary.get("curve", [])
    if not is_attacked(summary) or len(points) < 2:
        return None
    last = max(attempts or 0, points[-1]["attempts"])
    scale, ticks = _attempts_axis(last)
    x = [frame.x(scale(point["attempts"])) for point in points]
    n = summary["n"]
    # Prompts that occur several times are not independent.
    independent = summary["rates"]["attacked"].get("groups") or n
    intervals = [wilson_interval(point["rate"] * independent, independent) for point in points]
    line = _steps(x, [frame.y(point["rate"]) for point in points])
    lows, highs = (_steps(x, [frame.y(interval[end]) for interval in intervals]) for end in (0, 1))
    levels = [(name, rate) for name in ("floor", "ceiling") if (rate := rate_of(summary, name))]
    return Curve(
        frame=frame,
        line=_path(line),
        band=f"{_path([*highs, *reversed(lows)])} Z",
        ticks=[(frame.x(scale(tick)), str(tick)) for tick in ticks],
        end=(x[-1], frame.y(points[-1]["rate"])),
        rate=points[-1]["rate"],
        evaluations=points[-1]["unet_evaluations"] / n,
        levels=[(name, frame.y(rate.rate)) for name, rate in levels],
    )


def _attempts_axis(last: int) -> tuple[Callable[[float], float], list[int]]:
    """How attempts become shares of the width, and which get a number."""
    if last <= _LINEAR_UP_TO:
        step = max(1, math.ceil(last / 6))
        return lambda value: value / last, list(range(0, last + 1, step))
    return lambda value: math.log1p(value) / math.log1p(last), [tick for tick in _LOG_TICKS if tick <= last]


def _steps(x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float]]:
    """The corners of a line that keeps each height until the next place."""
    corners = [(x[0], y[0])]
    for number in range(1, len(x)):
        corners += [(x[number], y[number - 1]), (x[number], y[number])]
    return corners


def _path(corners: Sequence[tuple[float, float]]) -> str:
    return "M" + " L".join(f"{x} {y}" for x, y in corners)


@dataclass(frozen=True)
class Point:
    """A run in a trade-off plot: its number on the page, its place, and the ends of its interval along y."""

    number: int
    x: float
    y: float
    low: float
    high: float
    best: bool


@dataclass(frozen=True)
class Tradeoff:
    """Success under attack against what is retained, of the runs of one concept.

    Attributes:
        concept: Whose.
        label: What is along x.
        better: 1 where more of it is better, -1 where less is; less is then drawn to the right.
        frame: Where it is drawn.
        points: A run each; ``best`` are those that no other beats in both.
        ticks: Places and texts along x.
    """

    concept: str
    label: str
    better: int
    frame: Frame
    points: list[Point]
    ticks: list[tuple[float, str]]


def tradeoffs(summaries: Sequence[Mapping[str, Any]]) -> list[Tradeoff]:
    """A plot for each concept that has several runs, against the first measure of what is retained that all have."""
    plots = []
    for concept in dict.fromkeys(summary["concept"] for summary in summaries):
        runs = [(number, run) for number, run in enumerate(summaries, start=1) if run["concept"] == concept]
        for label, (retained, better) in RETAINED.items():
            try:
                kept = [retained(run["measures"]) for _, run in runs]
            except KeyError:
                continue
            if len(runs) > 1:
                plots.append(_tradeoff(label, better, runs, kept))
            break
    return plots


def _tradeoff(
    label: str, better: int, runs: Sequence[tuple[int, Mapping[str, Any]]], kept: Sequence[float]
) -> Tradeoff:
    frame, rates = Frame(), [Rate(**run["rates"]["attacked"]) for _, run in runs]
    best = set(frontier([(value, rate.rate) for value, rate in zip(kept, rates, strict=True)], better))
    lowest, highest = min(kept), max(kept)
    margin = 0.08 * (highest - lowest) or 0.05 * abs(highest) or 1.0
    start, end = lowest - margin, highest + margin
    if better < 0:
        start, end = end, start

    def place(value: float) -> float:
        return frame.x((value - start) / (end - start))

    points = [
        Point(
            number=number,
            x=place(value),
            y=frame.y(rate.rate),
            low=frame.y(rate.low),
            high=frame.y(rate.high),
            best=(value, rate.rate) in best,
        )
        for (number, _), value, rate in zip(runs, kept, rates, strict=True)
    ]
    ticks = [
        (place(value), f"{100 * value:.0f} %" if 0 <= lowest <= highest <= 1 else f"{value:.3g}")
        for value in dict.fromkeys([lowest, (lowest + highest) / 2, highest])
    ]
    return Tradeoff(concept_name(runs[0][1]), label, better, frame, points, ticks)
