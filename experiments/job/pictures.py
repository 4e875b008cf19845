"""Pictures of prompts in the store: one PNG each, which carries what made it."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from diffusion.files import replacing, set_aside
from diffusion.model import TextToImage
from diffusion.progress import progress_bar
from diffusion.sampling import Sampling
from evaluation.prompt_sets import PromptRow
from experiments.job.cost import Cost, Meter
from experiments.job.processes import ALONE, Processes
from experiments.job.store import Store, content_hash

_FACTS = "made from"

_DAMAGES = (OSError, KeyError, ValueError, TypeError, SyntaxError)
"""What reading a damaged PNG raises, or one that something else wrote."""


@dataclass(frozen=True)
class Pictures:
    """Pictures of a prompt set, in its order, on the disk.

    Attributes:
        paths: A file each.
        cost: What they cost when they were made.
        key: Hash of everything that they depend on, and of what they show.
        folder: Where they lie.
        origins: Who made them; see :meth:`experiments.job.store.Store.sign`.
    """

    paths: list[Path]
    cost: Cost
    key: str
    folder: Path
    origins: list[str]

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
    wanted = {picture_id(row.prompt, row.seed, row.guidance): row for row in rows}

    def look() -> None:
        for name, row in wanted.items():
            path = folder / f"{name}.png"
            if store.renews(path):
                path.unlink(missing_ok=True)
            if path.exists() and (problem := what_is_wrong(path, _told(row))):
                set_aside(path, problem)

    with processes.under(store.locked(folder, look, pictures={f"{name}.png" for name in wanted})):
        mine = processes.share(list(wanted.items()))
        waiting = [(name, row) for name, row in mine if not (folder / f"{name}.png").exists()]
        with progress_bar(label, len(mine), done=len(mine) - len(waiting)) as bar:
            for start in range(0, len(waiting), sampling.batch_size):
                part = waiting[start : start + sampling.batch_size]
                _make_batch(folder, model, part, sampling, store.origin)
                bar.advance(len(part))
    names = [picture_id(row.prompt, row.seed, row.guidance) for row in rows]
    paths = [folder / f"{name}.png" for name in names]
    facts = [read_facts(path) for path in paths]
    return Pictures(
        paths=paths,
        cost=Cost.total(map(Cost.of, facts)),
        key=content_hash([folder.name, names, [told["pixels"] for told in facts]]),
        folder=folder,
        origins=sorted({told["origin"] for told in facts}),
    )


def _told(row: PromptRow) -> dict[str, Any]:
    return {"prompt": row.prompt, "seed": row.seed, "guidance": row.guidance}


def _make_batch(
    folder: Path, model: TextToImage, part: list[tuple[str, PromptRow]], sampling: Sampling, origin: str
) -> None:
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
        write_picture(folder / f"{name}.png", image, {**_told(row), **cost.as_dict(), "origin": origin})


def write_picture(path: Path, image: Tensor, facts: Mapping[str, Any]) -> None:
    """Write ``image``, uint8 [3, H, W], as PNG with ``facts`` and the hash of its pixels in its text, atomically.

    The disk may have it later: a picture that a power cut took half of is set aside and made again.
    """
    text = PngImagePlugin.PngInfo()
    text.add_text(_FACTS, json.dumps({**facts, "pixels": pixel_hash(image)}, allow_nan=False))
    with replacing(path, flush=False) as partial:
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(partial, pnginfo=text)


def pixel_hash(image: Tensor) -> str:
    """16 hexadecimal digits for a picture's size and values, uint8 [3, H, W]."""
    digest = hashlib.sha256(str(list(image.shape)).encode())
    digest.update(image.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def read_picture(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """Read what :func:`write_picture` wrote.

    Raises:
        ValueError: The file is no such picture; it is set aside.
    """
    with _opened(path) as picture:
        image = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()
        facts: dict[str, Any] = json.loads(picture.info[_FACTS])
        if pixel_hash(image) != facts["pixels"]:
            raise ValueError("its pixels are not those that were written")
        return image, facts


def read_facts(path: Path) -> dict[str, Any]:
    """The facts of a picture, whose pixels are left unread.

    Raises:
        ValueError: The file is no such picture; it is set aside.
    """
    with _opened(path) as picture:
        facts: dict[str, Any] = json.loads(picture.info[_FACTS])
        return facts


def what_is_wrong(path: Path, facts: Mapping[str, Any]) -> str:
    """Why the file is no picture of these ``facts`` and others; empty if it is.

    PNG has a checksum in every part, so the pixels need not be unpacked to know that they are whole.
    """
    try:
        with Image.open(path) as picture:
            told = json.loads(picture.info[_FACTS])
            picture.verify()
        Cost.of(told)
        strange = [name for name in facts if told[name] != facts[name]]
        strange += [name for name in ("pixels", "origin") if not isinstance(told[name], str)]
    except _DAMAGES as error:
        return f"{type(error).__name__}: {error}"
    return f"it has another {strange[0]}" if strange else ""


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as picture:
            yield picture
    except FileNotFoundError:
        raise
    except _DAMAGES as error:
        set_aside(path, error)
        raise ValueError(f"{path} was damaged ({error}); run the same command again, which makes it anew.") from error
