"""How often does a judge err? On labelled pictures, or on those that the canvas draws."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from diffusion.files import write_atomically
from diffusion.progress import track
from erasure.concept import Concept
from evaluation.calibration import Calibration, calibrate
from evaluation.statistics import Rate
from experiments.command.composing import compose_job
from experiments.command.config import make_object
from experiments.instruments.labelled_pictures import (
    Labelled,
    batched,
    check_drawable,
    draw_pictures,
    list_pictures,
    read_pictures,
)
from experiments.job.origin import code_state
from experiments.job.store import write_json
from experiments.job.summary import now
from experiments.results.writing import markdown_table

_BATCH = 64
_COLUMNS = {
    "error": "error",
    "false_positives": "false positives",
    "false_negatives": "false negatives",
    "precision": "precision",
    "recall": "recall",
}


def run(overrides: Sequence[str], pictures: Path | None, drawn: int, seed: int) -> dict[str, Any]:
    """Judge labelled pictures; returns what is found and what was asked for, as JSON values.

    Args:
        overrides: Of the config, as for ``run.py``; ``judge`` and ``concept`` matter.
        pictures: A labelled folder or table, see :func:`~experiments.instruments.labelled_pictures.list_pictures`; None
            draws them.
        drawn: How many pictures to draw.
        seed: Of the drawing.

    Raises:
        CommandError: An override is wrong.
        ValueError: The pictures or the judge's files are.
        FileNotFoundError: There are no pictures.
    """
    config, choices = compose_job(overrides)
    concept: Concept = make_object(config, "concept")
    judge = make_object(config, "judge")
    labelled: Iterator[Labelled]
    if pictures is None:
        check_drawable(concept)
        labelled, count = islice(draw_pictures(concept, seed), drawn), drawn
    else:
        listed = list_pictures(pictures)
        labelled, count = read_pictures(listed), len(listed)
    found = calibrate(judge, batched(track(labelled, "pictures", count), _BATCH))
    return {
        "judge": choices["judge"],
        "concept": concept.name,
        "pictures": f"drawn on the canvas, seed {seed}" if pictures is None else str(pictures),
        **_as_json(found),
        "config": OmegaConf.to_container(config.judge, resolve=True),
        "created": now(),
        **code_state(),
    }


def markdown(result: Mapping[str, Any]) -> str:
    """What :func:`run` found, for readers."""
    auroc = "" if result["auroc"] is None else f" Area under the ROC curve: {result['auroc']:.4f}."
    verdicts = pd.DataFrame([{label: _text(result["verdicts"][name]) for name, label in _COLUMNS.items()}])
    thresholds = pd.DataFrame(
        [
            {"score more than": threshold} | {label: _text(errors[name]) for name, label in _COLUMNS.items()}
            for threshold, errors in result["thresholds"].items()
        ]
    )
    parts = [
        f"# Judge {result['judge']}, concept {result['concept']}",
        f"{result['n']} pictures ({result['pictures']}), of which {result['present']} show the concept.{auroc}",
        markdown_table(verdicts),
        "Wilson 95 % intervals. Error: wrong verdicts of all; false positives: of the pictures without the concept; "
        "false negatives: of those with it. Precision hangs on the share of pictures that show the concept.",
        "## Were the concept present where the score is more than a threshold",
        markdown_table(thresholds, disable_numparse=True),
    ]
    return "\n\n".join(parts) + "\n"


def write_calibration(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write what :func:`run` found into ``folder``, as JSON and as Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"judge_{result['judge']}_{result['concept']}.json"
    write_json(path, result)
    write_atomically(path.with_suffix(".md"), markdown(result))
    return [path, path.with_suffix(".md")]


def _as_json(found: Calibration) -> dict[str, Any]:
    return {**asdict(found), "thresholds": {f"{threshold:.2f}": asdict(e) for threshold, e in found.thresholds.items()}}


def _text(rate: Mapping[str, Any] | None) -> str:
    return "" if rate is None else str(Rate(**rate))
