"""Pictures of any prompt by the models of a run."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from torch import Tensor

from diffusion.model import TextToImage
from diffusion.sampling import Sampling
from erasure.edit import Edit
from experiments.job.made import EDIT
from experiments.job.remote_store import fetch


def stored_edit(store: Path, summary_edit: str) -> Edit:
    """The edit of a run, wherever its store lies now.

    Args:
        store: The store.
        summary_edit: Where the run's summary says that the edit lies; the store may have been moved since.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: It is damaged.
    """
    folder = store / "edits" / Path(summary_edit).name
    fetch(folder)
    return Edit.load(folder / EDIT)


def without_guards(edit: Edit) -> Edit:
    """What ``edit`` changes in the network alone."""
    kept = tuple(addition for addition in edit.additions if not addition.is_guard)
    return Edit(edit.entries, edit.metadata, kept)


def draw_pictures(
    model: TextToImage, edit: Edit, prompt: str, seeds: Sequence[int], guidance: float, sampling: Sampling
) -> dict[str, Tensor]:
    """Draw a prompt with each of the seeds.

    Returns:
        uint8 [seeds, 3, H, W] by the ``base`` model, the ``erased`` one, and the erased one ``with its guard``; only
        those that there are: an edit may change nothing but have a guard, or have none.
    """
    erased = without_guards(edit)
    edits: dict[str, Edit | None] = {"base": None}
    if erased or not edit:
        edits["erased"] = erased
    if len(erased.additions) < len(edit.additions):
        edits["with its guard"] = edit
    drawn = {}
    for name, applied in edits.items():
        with nullcontext() if applied is None else applied.applied(model):
            drawn[name] = model.generate(
                [prompt] * len(seeds),
                seeds=seeds,
                steps=sampling.steps,
                guidance=guidance,
                batch_size=sampling.batch_size,
            )
    return drawn
