"""Which of the store's pictures are a run's own: a file beside its summary, for whoever shows the run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.prompt_sets import PromptRow

FILE_NAME = "pictures.json"


def picture_list(
    root: Path,
    rows: Sequence[PromptRow],
    pictures: Mapping[str, Sequence[Path]],
    retained_rows: Sequence[PromptRow],
    retained_pictures: Mapping[str, Sequence[Path]],
) -> dict[str, list[dict[str, Any]]]:
    """The prompts of a run with their pictures, as JSON values.

    Args:
        root: Of the store. Pictures are named by their place in it, so that it may be moved.
        rows: The prompts that were attacked.
        pictures: Of each of them ``base``, ``erased`` and ``attacked``.
        retained_rows: The other prompts.
        retained_pictures: Of each of them ``base`` and ``erased``.

    Returns:
        ``cases`` and ``retained``: lists of rows, each with its labels, and its pictures by name.
    """
    return {"cases": _listed(root, rows, pictures), "retained": _listed(root, retained_rows, retained_pictures)}


def _listed(root: Path, rows: Sequence[PromptRow], pictures: Mapping[str, Sequence[Path]]) -> list[dict[str, Any]]:
    return [
        {
            "case_number": row.case_number,
            "prompt": row.prompt,
            "seed": row.seed,
            "guidance": row.guidance,
            "labels": dict(row.labels),
            "pictures": {name: paths[number].relative_to(root).as_posix() for name, paths in pictures.items()},
        }
        for number, row in enumerate(rows)
    ]
