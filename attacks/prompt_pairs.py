"""Prompts with a concept beside the same prompts without it, for attacks that learn from them what the concept is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import PlainValidator
from torch import Tensor

from diffusion.files import shipped
from diffusion.model import TextToImage
from diffusion.sampling import Sampling
from evaluation.prompt_sets import csv_rows

Pair = tuple[str, str]
"""A prompt with the concept, and the same prompt without it."""

PAIR_COLUMNS = ("with", "without")


def _path_or_pairs(value: Any) -> Path | tuple[Pair, ...]:
    match value:
        case str() | Path():
            path = shipped(Path(value))
            read_pairs(path)
            return path
        case [_, *_] if all(isinstance(pair, (list, tuple)) and [*map(type, pair)] == [str, str] for pair in value):
            return tuple((present, absent) for present, absent in value)
    raise ValueError(
        f"pairs is {value!r}; it must be a CSV file with the columns with,without or a list of pairs of prompts, "
        "as the field pairs of a concept names it."
    )


Pairs = Annotated[Path | tuple[Pair, ...], PlainValidator(_path_or_pairs)]
"""A field of an attack: the pairs, or a CSV file of them with the columns ``with`` and ``without``."""


def resolve_pairs(pairs: Path | tuple[Pair, ...]) -> tuple[Pair, ...]:
    """Return the pairs of such a field, read from their file if they are in one."""
    return read_pairs(pairs) if isinstance(pairs, Path) else pairs


def read_pairs(path: Path) -> tuple[Pair, ...]:
    """Read prompt pairs from the columns ``with`` and ``without`` of a UTF-8 CSV file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A column is missing, a row lacks a prompt, or there are no rows.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; pairs takes a CSV file with the columns with,without.")
    pairs = []
    with csv_rows(path, PAIR_COLUMNS) as reader:
        for row in reader:
            present, absent = ((row[column] or "").strip() for column in PAIR_COLUMNS)
            if not (present and absent):
                raise ValueError(f"{path} lacks a prompt in line {reader.line_num}; every row needs two.")
            pairs.append((present, absent))
    if not pairs:
        raise ValueError(f"{path} has no pairs below its first line.")
    return tuple(pairs)


def draw_in_turn(
    original: TextToImage, prompts: Sequence[str], seeds: Sequence[int], guidance: float, sampling: Sampling
) -> tuple[list[str], Tensor]:
    """Make a picture for each of the seeds, of the prompts in turn.

    Returns:
        The pictures' prompts, and uint8 [seeds, 3, H, W].
    """
    turns = [prompts[number % len(prompts)] for number in range(len(seeds))]
    images = original.generate(
        turns, seeds=seeds, steps=sampling.steps, guidance=guidance, batch_size=sampling.batch_size
    )
    return turns, images
