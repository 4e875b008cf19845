"""What an edit did to pictures that should have stayed: the worst first, and by style and subject."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate

from evaluation.prompt_sets import PromptRow
from evaluation.quality.accuracy import RetainedAccuracy
from experiments.results.report.images import data_uri, difference, open_picture

LOOKED_AT = 1000
"""Retained prompts whose pictures are compared."""

SHOWN = 24
"""Of these, the worst."""

_ACCURACY = f"{RetainedAccuracy.__module__}.{RetainedAccuracy.__qualname__}"


@dataclass(frozen=True)
class RetainedPicture:
    """A retained prompt before and after.

    Attributes:
        prompt: The text.
        base: The unedited model's picture, as a data URI.
        erased: The edited model's.
        difference: Root mean square of the pixels', 0 to 1.
        lost: What the classifier read off the first picture as the prompt has it and not off the second; None where
            no classifier was at work.
    """

    prompt: str
    base: str
    erased: str
    difference: float
    lost: tuple[str, ...] | None


@dataclass(frozen=True)
class Cell:
    """Of ``n`` pictures of one style and subject, how many ``lost`` either."""

    lost: int
    n: int

    @property
    def share(self) -> float:
        """Lost of all, 0 where there are none."""
        return self.lost / self.n if self.n else 0.0


@dataclass(frozen=True)
class HeatMap:
    """Pictures by style (rows) and subject (columns), with the sums of both."""

    styles: list[str]
    subjects: list[str]
    cells: Mapping[tuple[str, str], Cell]

    def cell(self, style: str | None, subject: str | None) -> Cell:
        """One cell; None sums over all."""
        found = [
            cell
            for (own_style, own_subject), cell in self.cells.items()
            if style in {None, own_style} and subject in {None, own_subject}
        ]
        return Cell(sum(cell.lost for cell in found), sum(cell.n for cell in found))


@dataclass(frozen=True)
class Retained:
    """All retained prompts that were looked at.

    Attributes:
        shown: The worst.
        count: How many were looked at.
        judged: Whether a classifier said what was lost; otherwise the largest difference is the worst.
        heat: By style and subject, where prompts have such labels and a classifier was at work.
    """

    shown: list[RetainedPicture]
    count: int
    judged: bool
    heat: HeatMap | None


def retained_of(rows: Sequence[Mapping[str, Any]], root: Path, config: Mapping[str, Any]) -> Retained | None:
    """Compare the pictures of retained prompts.

    Args:
        rows: Of a run's list of pictures; see :mod:`experiments.job.picture_list`.
        root: Of the store.
        config: The run's.

    Returns:
        None where no picture is left in the store.
    """
    paths = [[root / row["pictures"][name] for name in ("base", "erased")] for row in rows[:LOOKED_AT]]
    there = [number for number, pair in enumerate(paths) if all(path.is_file() for path in pair)]
    rows, paths = [rows[number] for number in there], [paths[number] for number in there]
    if not rows:
        return None
    lost = _lost(rows, paths, config)
    differences = [difference(*pair) for pair in paths]
    order = sorted(range(len(rows)), key=lambda number: (-len(lost[number] if lost else ()), -differences[number]))
    shown = [
        RetainedPicture(
            prompt=rows[number]["prompt"],
            base=data_uri(paths[number][0]) or "",
            erased=data_uri(paths[number][1]) or "",
            difference=differences[number],
            lost=lost[number] if lost else None,
        )
        for number in order[:SHOWN]
    ]
    return Retained(shown, len(rows), lost is not None, _heat_map(rows, lost) if lost else None)


def _lost(
    rows: Sequence[Mapping[str, Any]], paths: Sequence[Sequence[Path]], config: Mapping[str, Any]
) -> list[tuple[str, ...]] | None:
    """Of each picture the properties that the run's own classifier no longer reads off it; None without classifier."""
    settings = next((own for own in config["evaluator"].values() if own["_target_"] == _ACCURACY), None)
    if settings is None:
        return None
    try:
        accuracy: RetainedAccuracy = instantiate(settings)
        asked = [
            PromptRow(row["case_number"], row["prompt"], row["seed"], row["guidance"], row["labels"]) for row in rows
        ]
        base, erased = (accuracy.agreement(_stack([pair[place] for pair in paths]), asked) for place in (0, 1))
    except FileNotFoundError:
        # The classifier of another machine; the page still has the differences.
        return None
    return [
        tuple(head for head in base if base[head][number] and not erased[head][number]) for number in range(len(rows))
    ]


def _stack(paths: Sequence[Path]) -> torch.Tensor:
    pictures = np.stack([np.asarray(open_picture(path)) for path in paths])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def _heat_map(rows: Sequence[Mapping[str, Any]], lost: Sequence[tuple[str, ...]]) -> HeatMap | None:
    counts: dict[tuple[str, str], list[bool]] = {}
    for row, gone in zip(rows, lost, strict=True):
        labels = row["labels"]
        if labels.get("style") and labels.get("subject"):
            counts.setdefault((labels["style"], labels["subject"]), []).append(bool(gone))
    if not counts:
        return None
    styles, subjects = (sorted({pair[place] for pair in counts}) for place in (0, 1))
    return HeatMap(styles, subjects, {pair: Cell(sum(gone), len(gone)) for pair, gone in counts.items()})
