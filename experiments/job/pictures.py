"""Pictures of prompts in the store: one PNG each, which carries what made it."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from diffusion.files import replacing
from diffusion.model import TextToImage
from diffusion.progress import progress_bar
from diffusion.sampling import Sampling
from evaluation.prompt_sets import PromptRow
from experiments.job.cost import Cost, Meter
from experiments.job.processes import ALONE, Processes
from experiments.job.store import Store, content_hash

_FACTS = "made from"


@dataclass(frozen=True)
class Pictures:
    """Pictures of a prompt set, in its order, on the disk.

    Attributes:
        paths: A file each.
        cost: What they cost when they were made.
        key: Hash of everything that they depend on.
        folder: Where they lie.
    """

    paths: list[Path]
    cost: Cost
    key: str
    folder: Path

    @cached_property
    def images(self) -> Tensor:
        """All of them in memory, uint8 [n, 3, H, W]."""
        return self.read(0, len(self.paths))

    def read(self, start: int, end: int) -> Tensor:
        """Those from number ``start`` to before ``end``, uint8 [n, 3, H, W]."""
        return torch.stack([read_picture(path)[0] for path in self.paths[start:end]])


def picture_id(prompt: str, seed: int, guidance: float) -> str:
    """The name of a prompt's picture among those of one model and sampler."""
    return content_hash([prompt, seed, guidance])


def make_pictures(
    store: Store,
    key: dict[str, Any],
    model: TextToImage,
    rows: Sequence[PromptRow],
    sampling: Sampling,
    label: str,
    processes: Processes = ALONE,
) -> Pictures:
    """Find the pictures of ``rows`` in the store and make those that are missing, batch by batch.

    Args:
        store: Where they are looked up and kept.
        key: What all of them depend on: the model, the edit, the sampler.
        model: The model that ``key`` describes.
        rows: Their prompts.
        sampling: Settings of the sampler.
        label: What the progress line says.
        processes: Who shares the work.
    """
    folder = store.folder("pictures", key)
    names = [picture_id(row.prompt, row.seed, row.guidance) for row in rows]
    with processes.under(store.locked(folder)):
        mine = processes.share(list(dict(zip(names, rows, strict=True)).items()))
        waiting = [(name, row) for name, row in mine if not (folder / f"{name}.png").exists()]
        with progress_bar(label, len(mine), done=len(mine) - len(waiting)) as bar:
            for start in range(0, len(waiting), sampling.batch_size):
                part = waiting[start : start + sampling.batch_size]
                _make_batch(folder, model, part, sampling)
                bar.advance(len(part))
    paths = [folder / f"{name}.png" for name in names]
    return Pictures(
        paths=paths,
        cost=Cost.total(Cost.of(read_facts(path)) for path in paths),
        key=content_hash([folder.name, names]),
        folder=folder,
    )


def _make_batch(folder: Path, model: TextToImage, part: list[tuple[str, PromptRow]], sampling: Sampling) -> None:
    rows = [row for _, row in part]
    meter = Meter(model)
    images = model.generate(
        [row.prompt for row in rows],
        seeds=[row.seed for row in rows],
        steps=sampling.steps,
        guidance=[row.guidance for row in rows],
        batch_size=sampling.batch_size,
    )
    cost = meter.read().shared(len(rows))
    for (name, row), image in zip(part, images, strict=True):
        facts = {"prompt": row.prompt, "seed": row.seed, "guidance": row.guidance, **cost.as_dict()}
        write_picture(folder / f"{name}.png", image, facts)


def write_picture(path: Path, image: Tensor, facts: dict[str, Any]) -> None:
    """Write ``image``, uint8 [3, H, W], as PNG with ``facts`` in its text, atomically."""
    text = PngImagePlugin.PngInfo()
    text.add_text(_FACTS, json.dumps(facts, allow_nan=False))
    with replacing(path) as partial:
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(partial, pnginfo=text)


def read_picture(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """Read what :func:`write_picture` wrote.

    Raises:
        ValueError: The file is no such picture.
    """
    with _opened(path) as picture:
        image = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()
        return image, json.loads(picture.info[_FACTS])


def read_facts(path: Path) -> dict[str, Any]:
    """The facts of a picture, whose pixels are left unread.

    Raises:
        ValueError: The file is no such picture.
    """
    with _opened(path) as picture:
        facts: dict[str, Any] = json.loads(picture.info[_FACTS])
        return facts


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as picture:
            yield picture
    except (OSError, KeyError, ValueError, SyntaxError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run the same command again.") from error
