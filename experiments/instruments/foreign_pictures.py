"""Pictures that were made elsewhere, judged and measured as our own are."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.progress import track
from evaluation.picture_files import is_picture_file, neighbours, read_picture_file
from evaluation.prompt_sets import DEFAULT_SEED, PromptRow, csv_rows
from evaluation.quality import Evaluator, Measurement, Measures
from evaluation.statistics import Rate
from evaluation.verdicts import Judge, LabelCounts, label_counts

BATCH = 64
"""Pictures that are judged at a time; no effect on results."""

_OURS = ("file", "prompt", "seed")


@dataclass(frozen=True)
class Picture:
    """A file and what it is a picture of.

    Attributes:
        file: Where it lies.
        row: Its prompt, which may be empty, its seed, and every further column of the table as labels.
    """

    file: Path
    row: PromptRow


@dataclass(frozen=True)
class Judged:
    """What is found in pictures.

    Attributes:
        present: Of each whether it shows the concept.
        scores: Of each how much.
        rate: Of those that do.
        labels: How often each label was found, where the judge has labels.
        measures: Numbers of the evaluators, by name.
    """

    present: list[bool]
    scores: list[float]
    rate: Rate
    labels: LabelCounts
    measures: Measures


def list_pictures(source: Path) -> list[Picture]:
    """The pictures of a folder by name, or those of a table in its order.

    Args:
        source: A folder, or a CSV file with the column ``file`` (beside it, or a whole path), and ``prompt`` and
            ``seed`` where they are known.

    Raises:
        FileNotFoundError: There is nothing at ``source``, or a file of the table is not there.
        ValueError: There are no pictures, or a row is broken.
    """
    if source.is_dir():
        files = [file for file in sorted(source.rglob("*")) if is_picture_file(file, source)]
        listed = [Picture(file, PromptRow(number, "")) for number, file in enumerate(files)]
    elif source.is_file():
        listed = list(_rows(source))
    else:
        raise FileNotFoundError(f"There is nothing at {source}; name a folder or a CSV file with file,prompt,seed.")
    if not listed:
        raise ValueError(f"{source} names no pictures (.png, .jpg, .webp, .tif, ...).")
    return listed


def _rows(table: Path) -> Iterator[Picture]:
    with csv_rows(table, ("file",)) as reader:
        for number, row in enumerate(reader):
            file = table.parent / (row["file"] or "").strip()
            seed = (row.get("seed") or "").strip() or str(DEFAULT_SEED)
            if not file.is_file():
                raise FileNotFoundError(f"{table}, line {reader.line_num}: there is no file {file}.")
            if not (seed.isascii() and seed.isdigit()):
                raise ValueError(f"{table}, line {reader.line_num}: seed is {seed!r}, not a whole number from 0.")
            labels = {name: text or "" for name, text in row.items() if name is not None and name not in _OURS}
            prompt = (row.get("prompt") or "").strip()
            yield Picture(file, PromptRow(number, prompt, int(seed), labels=labels))


def judge_pictures(
    pictures: Sequence[Picture],
    judge: Judge,
    evaluators: Mapping[str, Evaluator],
    reference: Sequence[Picture] | None = None,
) -> Judged:
    """Judge all pictures, and measure them against those of the unedited model.

    Args:
        pictures: What is judged.
        judge: Says whether they show the concept.
        evaluators: Measure them if there are ``reference`` pictures.
        reference: Pictures by the unedited model, in the same order.

    Raises:
        ValueError: A file is no picture, the references are fewer or more, or pictures that are measured lack prompts.
    """
    if reference is not None:
        if len(reference) != len(pictures):
            raise ValueError(
                f"There are {len(pictures)} pictures and {len(reference)} reference pictures; give one for each, in "
                "the same order."
            )
        if bare := next((picture for picture in pictures if not picture.row.prompt), None):
            raise ValueError(f"{bare.file} has no prompt, which measures need; give a CSV file with file,prompt,seed.")
    measurements = [evaluator.start() for evaluator in evaluators.values()] if reference is not None else []
    present: list[bool] = []
    scores: list[float] = []
    labels: list[list[str]] = []
    pairs = zip(pictures, reference if reference is not None else [None] * len(pictures), strict=True)
    read = ((picture, read_picture_file(picture.file), other) for picture, other in pairs)
    for part in neighbours(track(read, "pictures", len(pictures)), BATCH, lambda item: item[1]):
        images = torch.stack([image for _, image, _ in part])
        verdicts = judge(images)
        present += [bool(there) for there in verdicts.present]
        scores += [float(score) for score in verdicts.score]
        found: Any = verdicts.details.get("labels", [])
        labels += found
        _measure(measurements, images, [picture.row for picture, _, _ in part], [other for _, _, other in part])
    measures: Measures = {}
    for measurement in measurements:
        measures |= measurement.compute()
    return Judged(present, scores, Rate.of(present), label_counts(labels) if labels else {}, measures)


def _measure(
    measurements: Sequence[Measurement], images: Tensor, rows: Sequence[PromptRow], others: Sequence[Picture | None]
) -> None:
    if not measurements:
        return
    files = [other.file for other in others if other is not None]
    references = [read_picture_file(file) for file in files]
    if odd := next(
        (file for file, image in zip(files, references, strict=True) if image.shape != images[0].shape), None
    ):
        size = "x".join(map(str, images.shape[:1:-1]))
        raise ValueError(f"{odd} is not of the size of its picture, {size}; give reference pictures of the same sizes.")
    for measurement in measurements:
        measurement.update(images, torch.stack(references), rows)
