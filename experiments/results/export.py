"""A run's erased model for other people: a folder of diffusers or one file, a model card, and a hash that ties both."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from diffusion.compvis import single_file_weights
from diffusion.files import replacing, write_atomically
from diffusion.loading import quiet_off_a_terminal
from diffusion.model import TextToImage
from diffusion.parameters import TEXT_ENCODER_PREFIX, named_parameters
from erasure.edit import Edit
from erasure.export import export, require_plain
from experiments.job.store import content_hash, write_json
from experiments.results.eval_results import write_eval_results
from experiments.results.guarded import CODE, export_guarded, require_exportable
from experiments.results.model_card import Form, model_card

RECORD = "eraselab.json"
"""The file that says which run a folder is from, and what its weights hash to."""

WEIGHTS = ".safetensors"

Names = Literal["diffusers", "compvis"]


@dataclass(frozen=True)
class Changes:
    """How much an edit changes.

    Attributes:
        weights: Of the U-Net and the text encoder.
        changed: Of these, how many have another value.
        zeros: Of those that changed, how many are zero now: what was pruned.
        text_encoder: Whether weights of the text encoder are among them.
    """

    weights: int
    changed: int
    zeros: int
    text_encoder: bool

    @classmethod
    @torch.no_grad()
    def of(cls, model: TextToImage, edit: Edit) -> "Changes":
        """What ``edit`` changes in ``model``."""
        parameters = named_parameters(model)
        before = {name: parameters[name].detach().clone() for name in edit.entries}
        with edit.applied(model):
            differs = {name: parameters[name] != before[name] for name in edit.entries}
            zeros = sum(int((differs[name] & (parameters[name] == 0)).sum()) for name in edit.entries)
        return cls(
            sum(parameter.numel() for parameter in parameters.values()),
            sum(int(changed.sum()) for changed in differs.values()),
            zeros,
            any(name.startswith(TEXT_ENCODER_PREFIX) for name in edit.entries),
        )


def export_run(
    model: TextToImage,
    edit: Edit,
    summary: Mapping[str, Any],
    others: Sequence[Mapping[str, Any]],
    target: Path,
    calibration: Mapping[str, Any] | None = None,
    names: Names = "diffusers",
) -> list[Path]:
    """Write the erased model of a run with its card.

    Args:
        model: The run's base model, unedited.
        edit: The run's; what it adds to the model, such as a guard, comes with the folder as code of its pipeline.
        summary: Of the run.
        others: Summaries of other runs with the same edit, for the card.
        target: A folder that is not there yet or empty; or a file whose name ends in ``.safetensors``.
        calibration: What is known of the judge's errors; see :mod:`experiments.command.calibrate`.
        names: Of the tensors in a file: by ``diffusers``, the U-Net's weights (and those of the text encoder, with
            ``text_encoder.`` before the name, if the edit changes any); by ``compvis``, the whole model for WebUIs.

    Returns:
        What was written: the weights' folder or file, the card, and the record with the hashes.

    Raises:
        ValueError: The edit adds what no folder or file can hold, or ``target`` exists.
    """
    to_file = target.suffix == WEIGHTS
    if to_file:
        require_plain(edit)
    require_exportable(model, edit)
    changes = Changes.of(model, edit)
    target.parent.mkdir(parents=True, exist_ok=True)
    if to_file:
        if target.exists():
            raise ValueError(f"{target} exists; choose another file to export to.")
        _write_file(model, edit, summary, target, names, text_encoder=changes.text_encoder)
        files, card, record = [target], target.with_suffix(".md"), target.with_suffix(".json")
    else:
        with quiet_off_a_terminal():
            (export_guarded if edit.additions else export)(model, edit, target)
        files = sorted(path for path in target.rglob("*") if path.suffix == WEIGHTS or path.name == f"{CODE}.py")
        card, record = target / "README.md", target / RECORD
        write_eval_results([summary, *others], target)
    told = tie(summary, {file.relative_to(target.parent if to_file else target): file for file in files})
    write_json(record, told)
    form: Form = ("guarded" if edit.additions else "folder") if not to_file else names
    write_atomically(card, model_card(summary, others, changes, told, calibration, form=form))
    return [target, card, record]


def tie(summary: Mapping[str, Any], files: Mapping[Path, Path]) -> dict[str, Any]:
    """The run, the edit, the base and the hashes of the exported ``files``, by name; and the hash of all these."""
    told = {
        "run": summary["run"],
        "edit": summary["edit"]["hash"],
        "base": summary["identity"]["model"]["weights"],
        "files": {name.as_posix(): _sha256(file) for name, file in sorted(files.items())},
    }
    return {**told, "hash": content_hash(told)}


def _write_file(
    model: TextToImage, edit: Edit, summary: Mapping[str, Any], target: Path, names: Names, *, text_encoder: bool
) -> None:
    with edit.applied(model):
        tensors = dict(model.network.state_dict()) if names == "diffusers" else single_file_weights(model)
        if names == "diffusers" and text_encoder:
            tensors |= {
                f"{TEXT_ENCODER_PREFIX}{name}": value for name, value in model.text_encoder.state_dict().items()
            }
        # No key is called edit, which marks the files of edits.
        header = {"run": summary["run"], "edit_hash": summary["edit"]["hash"], "concept": summary["concept"]}
        # Copies, as tensors that share memory cannot be written.
        whole = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        with replacing(target) as partial:
            save_file(whole, partial, metadata=header)


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
