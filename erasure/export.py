"""An edited model as a folder that plain diffusers loads."""

import os
import shutil
from pathlib import Path

from diffusion.disk import writing
from diffusion.model import TextToImage
from erasure.edit import Edit


def require_plain(edit: Edit) -> None:
    """See to it that an edit changes weights alone.

    Raises:
        ValueError: It adds what no plain pipeline has; the sentence names it.
    """
    if edit.additions:
        raise ValueError(
            f"The edit adds {', '.join(addition.kind for addition in edit.additions)} to the model, which no plain "
            "pipeline folder can hold; keep the edit beside the base model."
        )


def export(model: TextToImage, edit: Edit, folder: Path) -> None:
    """Write the edited model as a safetensors folder of its own pipeline that plain diffusers loads.

    Args:
        model: The unedited model.
        edit: What to change in it.
        folder: Where to; its parent must exist.

    Raises:
        ValueError: The folder exists and is not empty; or the edit adds what no plain pipeline has.
    """
    require_plain(edit)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; choose another folder to export to.")
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    pipeline = model.as_pipeline()
    try:
        with edit.applied(model), writing(folder, partial):
            pipeline.save_pretrained(partial, safe_serialization=True)  # type: ignore[attr-defined]
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
