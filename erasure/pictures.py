"""Pictures that the model itself makes of prompts, and noise on them: what losses on pictures train on."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.identity import identity
from diffusion.leases import holding
from diffusion.model import TextToImage
from diffusion.progress import track
from diffusion.source_code import code_of
from diffusion.streams import stream
from erasure.trajectories import remembered

PICTURES_PER_FILE = 64


@dataclass(frozen=True)
class Painting:
    """How pictures are made.

    Attributes:
        images: How many.
        steps: Sampler steps from noise to picture.
        guidance: Guidance scale.
        batch_size: Pictures at a time; it changes speed and memory only.
        cache: Folder that keeps pictures for every job that makes the same ones; None for the job's checkpoint.
    """

    images: int
    steps: int
    guidance: float
    batch_size: int
    cache: Path | None = None

    def seeds(self, seed: int) -> list[int]:
        """The seed of every picture."""
        return torch.randint(2**31, (self.images,), generator=stream(seed, "painting/seeds")).tolist()  # type: ignore[no-any-return]

    def sample(self, model: TextToImage, text: Tensor, seeds: Sequence[int], until: int | None = None) -> Tensor:
        """Latents of pictures of ``text``, float [n, tokens, width], finished or before step ``until``."""
        return model.sample(
            text, seeds=seeds, steps=self.steps, guidance=self.guidance, until=until, batch_size=self.batch_size
        )


@dataclass(frozen=True)
class NoisedPictures:
    """Rows of training data.

    Attributes:
        latents: float [n, c, h, w], x_t.
        timesteps: int64 [n], t.
        noise: float [n, c, h, w], what was added to the pictures.
        prompts: int64 [n], which prompt each picture was made of.
    """

    latents: Tensor
    timesteps: Tensor
    noise: Tensor
    prompts: Tensor


@dataclass(frozen=True)
class Pictures:
    """Pictures and what they were made of.

    Attributes:
        latents: float [n, c, h, w].
        prompts: int64 [n], which prompt each was made of.
    """

    latents: Tensor
    prompts: Tensor

    def noised(
        self, model: TextToImage, picks: Tensor, generator: torch.Generator, timesteps: Tensor | None = None
    ) -> NoisedPictures:
        """The pictures ``picks``, int64 [n], each with noise of its own, at ``timesteps`` int64 [n] or uniform ones."""
        if timesteps is None:
            timesteps = torch.randint(model.training_timesteps, (len(picks),), generator=generator)
        noise = torch.randn((len(picks), *model.latent_shape), generator=generator).to(self.latents)
        timesteps = timesteps.to(model.device)
        latents = model.add_noise(self.latents[picks], noise, timesteps)
        return NoisedPictures(latents, timesteps, noise, self.prompts[picks])

    def draw(self, model: TextToImage, size: int, generator: torch.Generator) -> NoisedPictures:
        """``size`` of the pictures, any, with noise."""
        return self.noised(model, torch.randint(len(self.latents), (size,), generator=generator), generator)


def paint(
    model: TextToImage,
    prompts: Sequence[str],
    text: Tensor,
    painting: Painting,
    *,
    seed: int,
    part: str,
    checkpoint: Path | None,
) -> tuple[Pictures, int]:
    """Let the model make pictures; prompts take turns.

    Args:
        model: The unedited model.
        prompts: What the pictures are of.
        text: Their embeddings, float [prompts, tokens, width].
        painting: How.
        seed: Of the pictures' seeds.
        part: What these pictures are called in the names of the checkpoint's files.
        checkpoint: Finished pictures are kept in files whose names start with this one, and found again.

    Returns:
        The pictures, and the U-Net evaluations that they cost, whoever made them.
    """
    order = torch.arange(painting.images) % len(text)
    seeds = painting.seeds(seed)
    made_by: dict[str, Any] = {}
    if painting.cache is not None:
        made_by = {
            "model": identity(model),
            "sampler": [painting.steps, painting.guidance],
            "code": code_of(Painting),
        }

    def paint_some(chunk: Tensor) -> tuple[dict[str, Tensor], int]:
        chosen = [seeds[place] for place in chunk]

        def sample() -> dict[str, Tensor]:
            return {"latents": painting.sample(model, text[order[chunk]], chosen)}

        if painting.cache is None:
            return remembered(checkpoint, f"{part}-{int(chunk[0])}", sample, model)
        content = {**made_by, "prompts": [prompts[place] for place in order[chunk]], "seeds": chosen}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        painting.cache.mkdir(parents=True, exist_ok=True)
        with holding(painting.cache / f".{digest[:16]}.lease"):
            return remembered(painting.cache / digest[:16], "pictures", sample, model)

    chunks = torch.arange(painting.images).split(PICTURES_PER_FILE)
    painted = [paint_some(chunk) for chunk in track(chunks, "pictures", len(chunks))]
    latents = torch.cat([tensors["latents"] for tensors, _ in painted])
    return Pictures(latents, order), sum(spent for _, spent in painted)
