"""CLIP score: how well pictures fit their prompts (Hessel et al. 2021, 2104.08718)."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn
from torchmetrics.functional.multimodal import clip_score
from transformers import CLIPModel, CLIPProcessor

from diffusion.checked import checked
from diffusion.files import why_unreadable
from diffusion.loading import quiet_off_a_terminal
from diffusion.sources import CANVAS_FOLDER, weights_variant
from diffusion.weight_files import LOADING_ERRORS
from evaluation.quality.collected import Collected
from evaluation.quality.text_scores import text_scores


class ClipFeatures(nn.Module):
    """CLIP as torchmetrics expects it: features are tensors, where transformers 5 wraps them in an output object."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip
        self.config = clip.config

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Projected picture features, float [n, width]."""
        return self.clip.get_image_features(pixel_values).pooler_output  # type: ignore[no-any-return]

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Projected text features, float [n, width]."""
        return self.clip.get_text_features(input_ids, attention_mask).pooler_output  # type: ignore[no-any-return]


class TruncatingProcessor:
    """A CLIP processor that cuts long texts before their end token, where torchmetrics would cut that token off."""

    def __init__(self, processor: CLIPProcessor) -> None:
        self.processor = processor

    def __call__(self, *, images: list[Tensor] | None = None, text: list[str] | None = None, **options: Any) -> Any:
        """Pixels of pictures, or ids and mask of texts."""
        if text is None:
            return self.processor(images=images, return_tensors="pt")
        return self.processor(text=text, truncation=True, **options)


CLIP_FOLDER = CANVAS_FOLDER / "clip"
"""The shipped CLIP."""


@lru_cache(maxsize=2)
def load_clip(folder: Path = CLIP_FOLDER) -> tuple[ClipFeatures, TruncatingProcessor]:
    """The CLIP in ``folder`` in float32 with its processor, read once per process.

    Raises:
        FileNotFoundError: ``folder`` holds no CLIP.
        ValueError: Its files are damaged.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no CLIP (config.json, model.safetensors, the processor's files).")
    try:
        with quiet_off_a_terminal():
            clip = CLIPModel.from_pretrained(folder, dtype=torch.float32, variant=weights_variant(folder))
            processor = CLIPProcessor.from_pretrained(folder)
    except LOADING_ERRORS as error:
        raise ValueError(
            f"The CLIP in {folder} cannot be read; download it again: {why_unreadable(folder, error)}."
        ) from error
    return ClipFeatures(clip.eval().requires_grad_(False)), TruncatingProcessor(processor)


@checked
class ClipScore:
    """The mean over pictures of max(100 cos(E_image, E_text), 0), through torchmetrics.

    Attributes:
        folder: A transformers folder with a ``CLIPModel`` and its processor; null for the shipped one.
        name: What results call the score.
    """

    folder: Annotated[Path, BeforeValidator(lambda folder: CLIP_FOLDER if folder is None else folder)] = CLIP_FOLDER
    name: Annotated[str, Field(min_length=1)] = "clip_score"

    @torch.no_grad()
    def scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The score of each picture, float [n], from uint8 ``images`` [n, 3, H, W] and their n prompts.

        Raises:
            ValueError: The numbers of pictures and prompts differ.
            FileNotFoundError: ``folder`` holds no CLIP.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} pictures and {len(prompts)} prompts do not match; give one prompt each.")
        loaded = load_clip(self.folder)
        # Pair by pair, because torchmetrics returns the mean of what it is given.
        scores = [clip_score(image, prompt, lambda: loaded) for image, prompt in zip(images, prompts, strict=True)]
        return torch.stack(scores) if scores else torch.empty(0)

    def start(self) -> Collected:
        """Measure ``<name>`` of the edited model and ``<name>_base``, each a :class:`evaluation.statistics.Mean`."""
        return text_scores(self.name, self.scores)
