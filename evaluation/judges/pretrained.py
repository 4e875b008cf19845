"""What judges share that read published networks: where the files lie, and on which device they run.

Nothing is downloaded here: what is missing is named with its remedy when the judge is made, before any work starts.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from pydantic import AfterValidator, BeforeValidator
from torch import Tensor

from diffusion.loading import Device
from diffusion.sources import HUB_ID

_NEEDED = '--include "*.json" --include "*.txt" --include "model*.safetensors"'
_FILES = (
    ("config.json", "config.json"),
    ("model*.safetensors", "pytorch_model*.bin", "model.safetensors"),
    ("preprocessor_config.json", "processor_config.json", "preprocessor_config.json"),
)
"""What a network's folder must have, by any of several names, the last of which is told."""


def existing_file(remedy: str) -> AfterValidator:
    """Check that a path is a file; an error ends in ``remedy``, which says where to get it."""

    def check(file: Path) -> Path:
        if not file.expanduser().is_file():
            raise ValueError(f"it is {str(file)!r}, which is no file; {remedy}.")
        return file.expanduser()

    return AfterValidator(check)


def find_folder(source: object, remedy: str) -> Path:
    """The folder where a network in transformers' format lies, from the folder itself or its Hub id.

    A Hub id stands for its files in the Hub's cache, where ``hf download`` puts them.

    Raises:
        ValueError: There is no such folder; the message ends in ``remedy``, which says where to get one.
    """
    if not isinstance(source, str | Path):
        raise ValueError(f"it is {'null' if source is None else repr(source)}; {remedy}.")
    folder = Path(source).expanduser()
    if folder.is_dir():
        if missing := _missing(folder):
            raise ValueError(f"it is {str(source)!r}, a folder without {missing}; {remedy}.")
        return folder
    if not HUB_ID.fullmatch(str(source)):
        raise ValueError(f"it is {str(source)!r}, which is no folder; {remedy}.")
    try:
        cached = Path(snapshot_download(str(source), local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError):
        cached = None
    if cached is None or _missing(cached):
        raise ValueError(
            f"it is {str(source)!r}, which is neither a folder nor whole in the cache {constants.HF_HUB_CACHE}; "
            f"run `hf download {source} {_NEEDED}` where there is a network, or {remedy}."
        )
    return cached


def local_folder(remedy: str) -> BeforeValidator:
    """Turn a folder or a Hub id into the folder where its files lie; see :func:`find_folder`."""
    return BeforeValidator(lambda source: find_folder(source, remedy))


def _missing(folder: Path) -> str:
    """What of a network's files a folder lacks."""
    for *names, wanted in _FILES:
        if not any(file for name in names for file in folder.glob(name)):
            return wanted
    return ""


def _check_device(device: Device) -> Device:
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("it is 'cuda', but PyTorch finds no GPU here; use cpu or auto.")
    return device


TorchDevice = Annotated[Device, AfterValidator(_check_device)]
"""Where a network runs; ``auto`` takes a GPU if there is one."""


def pick_device(device: Device) -> torch.device:
    """The device that a field's value means here."""
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def batches(images: Tensor, batch_size: int) -> Iterator[Tensor]:
    """``images`` [n, ...] in parts of at most ``batch_size``; none if there are no images."""
    return iter(images.split(batch_size) if len(images) else ())


@torch.no_grad()
def scores_of(images: Tensor, batch_size: int, score: Callable[[Tensor], Any], columns: int) -> Tensor:
    """``score`` of every batch of ``images``, put together on the CPU: float32 [n, columns]."""
    parts = [score(batch).float().cpu() for batch in batches(images, batch_size)]
    return torch.cat(parts) if parts else torch.empty(0, columns)
