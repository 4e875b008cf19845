"""CLIP score with the models of open_clip (Hessel et al. 2021, 2104.08718)."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import open_clip
import torch
from huggingface_hub import try_to_load_from_cache
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from pydantic import AfterValidator, Field, ValidationInfo, field_validator
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torchvision.transforms.functional import to_pil_image

from diffusion.checked import checked
from diffusion.files import why_unreadable
from diffusion.sources import hub_answers
from diffusion.weight_files import LOADING_ERRORS
from evaluation.judges.pretrained import TorchDevice, batches, pick_device
from evaluation.quality.collected import Collected
from evaluation.quality.text_scores import text_scores


def _known(model: str) -> str:
    if model not in open_clip.list_models():
        raise ValueError(f"it is {model!r}; open_clip knows {', '.join(open_clip.list_models())}.")
    return model


@checked
class OpenClipScore:
    """The mean over pictures of max(scale cos(E_image, E_text), 0).

    Attributes:
        model: One of open_clip's models, as ``ViT-B-32-quickgelu``.
        weights: Its checkpoint, or the name of one that open_clip downloads, as ``openai``.
        scale: 100 for CLIP score as it was defined; 1 for the cosine itself.
        name: What results call the score.
        batch_size: Pictures at a time; no effect on results.
        device: ``auto`` takes a GPU if there is one.

    Raises:
        ValueError: open_clip knows no such model, or the weights are not here and cannot be fetched.
    """

    model: Annotated[str, AfterValidator(_known)]
    weights: Path
    scale: Annotated[float, Field(gt=0)] = 100.0
    name: Annotated[str, Field(min_length=1)] = "clip_score"
    batch_size: Annotated[int, Field(ge=1)] = 64
    device: TorchDevice = "auto"

    @field_validator("weights", mode="before")
    @classmethod
    def _find(cls, weights: str | Path, others: ValidationInfo) -> Path:
        if (file := Path(weights).expanduser()).is_file() or "model" not in others.data:
            return file
        return _checkpoint(others.data["model"], str(weights))

    @torch.no_grad()
    def scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The score of each picture, float [n], from uint8 ``images`` [n, 3, H, W] and their n prompts.

        Raises:
            ValueError: The numbers of pictures and prompts differ, or the weights are not the model's.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} pictures and {len(prompts)} prompts do not match; give one prompt each.")
        device = pick_device(self.device)
        network, preprocess, tokenize = load_open_clip(self.model, self.weights, device)
        parts = [torch.empty(0)]
        for start, batch in enumerate(batches(images, self.batch_size)):
            texts = list(prompts[start * self.batch_size :][: len(batch)])
            pixels = torch.stack([preprocess(to_pil_image(image)) for image in batch.cpu()]).to(device)
            pictures, words = network.encode_image(pixels), network.encode_text(tokenize(texts).to(device))
            parts.append(self.scale * cosine_similarity(pictures, words).clamp(min=0).cpu())
        return torch.cat(parts)

    def start(self) -> Collected:
        """Measure ``<name>`` of the edited model and ``<name>_base``, each a :class:`evaluation.statistics.Mean`."""
        return text_scores(self.name, self.scores)


@lru_cache(maxsize=2)
def load_open_clip(model: str, weights: Path, device: torch.device) -> tuple[Any, Any, Any]:
    """The network in float32, its preprocessing of a PIL picture and its tokenizer, read once per process.

    Raises:
        ValueError: The file holds no weights of this model.
    """
    try:
        network, _, preprocess = open_clip.create_model_and_transforms(model, pretrained=str(weights), device=device)
    except LOADING_ERRORS as error:
        raise ValueError(
            f"{weights} holds no weights of open_clip's {model}: {why_unreadable(weights, error)}."
        ) from error
    return network.eval().requires_grad_(False), preprocess, open_clip.get_tokenizer(model)


def _checkpoint(model: str, tag: str) -> Path:
    """The file of a published checkpoint, from the Hub or its cache."""
    tags = open_clip.list_pretrained_tags_by_model(model)
    if tag not in tags:
        raise ValueError(f"it is {tag!r}, neither a file nor one of open_clip's for {model}: {', '.join(tags)}.")
    published = open_clip.get_pretrained_cfg(model, tag)
    repository, _, name = published["hf_hub"].rpartition("/")
    for file in (name,) if name else (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME):
        if isinstance(cached := try_to_load_from_cache(repository, file), str):
            return Path(cached)
    if not hub_answers():
        raise ValueError(
            f"it is {tag!r}, which is not in the Hub's cache, and the Hub cannot be reached; run `hf download "
            f"{repository} {name or HF_SAFE_WEIGHTS_NAME}` where there is a network, and name the file here."
        )
    return Path(open_clip.download_pretrained(published))
