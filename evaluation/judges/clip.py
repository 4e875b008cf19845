"""What judges by CLIP share: its features of pictures and texts (Radford et al. 2021, 2103.00020)."""

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import torch
from pydantic import AfterValidator, BeforeValidator
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPProcessor

from diffusion.files import why_unreadable
from diffusion.loading import quiet_off_a_terminal
from diffusion.sources import CANVAS, CANVAS_FOLDER, weights_variant
from diffusion.weight_files import LOADING_ERRORS
from evaluation.judges.pretrained import local_folder


def _is_clip(folder: Path) -> Path:
    config = folder / "config.json"
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{config} cannot be read; download it again: {why_unreadable(config, error)}.") from error
    if kind != "clip":
        raise ValueError(f"it is {str(folder)!r}, which holds a network of type {kind}; it must be clip.")
    return folder


ClipFolder = Annotated[
    Path,
    AfterValidator(_is_clip),
    local_folder("give the folder of a CLIP in transformers' format, such as openai/clip-vit-large-patch14"),
    # Of several checks before, the last is the first.
    BeforeValidator(lambda source: CANVAS_FOLDER / "clip" if source == CANVAS else source),
]
"""Folder or Hub id of a CLIP in transformers' format; ``canvas`` means the shipped one, which knows nothing else."""


@lru_cache(maxsize=2)
def _load(folder: Path, device: torch.device) -> tuple[CLIPModel, CLIPProcessor]:
    try:
        with quiet_off_a_terminal():
            clip = CLIPModel.from_pretrained(folder, dtype=torch.float32, variant=weights_variant(folder))
            return clip.eval().to(device), CLIPProcessor.from_pretrained(folder)
    except LOADING_ERRORS as error:
        raise ValueError(
            f"The CLIP in {folder} cannot be read; download it again: {why_unreadable(folder, error)}."
        ) from error


def picture_features(folder: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """CLIP's normalised features of pictures, as a function from uint8 [n, 3, H, W] to float32 [n, width].

    Raises:
        ValueError: The files in ``folder`` are damaged.
    """
    clip, processor = _load(folder, device)

    def features(images: Tensor) -> Tensor:
        pixels = processor(images=list(images.cpu()), return_tensors="pt").pixel_values
        return normalize(clip.get_image_features(pixels.to(device)).pooler_output, dim=-1)

    return features


@lru_cache(maxsize=8)
@torch.no_grad()
def text_features(folder: Path, device: torch.device, texts: tuple[str, ...]) -> Tensor:
    """CLIP's normalised features of ``texts`` times its logit scale, float32 [texts, width]; long texts are cut."""
    clip, processor = _load(folder, device)
    tokens = processor(text=list(texts), padding=True, truncation=True, return_tensors="pt").to(device)
    features = clip.get_text_features(tokens.input_ids, tokens.attention_mask).pooler_output
    scaled: Tensor = normalize(features, dim=-1) * clip.logit_scale.exp()
    return scaled
