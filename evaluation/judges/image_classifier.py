"""What judges by an image classifier share: the network, and its label among the most likely."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torchvision.models import ResNet50_Weights, resnet50
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from diffusion.checked import checked
from diffusion.files import why_unreadable
from diffusion.loading import quiet_off_a_terminal
from diffusion.sources import weights_variant
from diffusion.weight_files import LOADING_ERRORS, read_network_weights
from evaluation.judges.labels import find_label, rank_label
from evaluation.judges.pretrained import TorchDevice, pick_device, scores_of
from evaluation.verdicts import Verdicts

Network = Callable[[Tensor], Tensor]
"""Logits, float [n, labels], of uint8 pictures [n, 3, H, W] of any size."""

TORCHVISION_FILES = {Path(weights.url).name: weights for weights in ResNet50_Weights}
"""ResNet-50 weights files of torchvision, by which each needs its own resizing."""


@checked
class ImageClassifierJudge:
    """Says that the concept is present where ``label`` is among the ``top_k`` most likely; scored by its probability.

    Attributes:
        network: The classifier's folder or file.
        label: The concept, as :func:`~evaluation.judges.labels.find_label` reads it.
        top_k: How many of the most likely labels count.
        batch_size: Pictures at a time; no effect on results.
        device: ``auto`` takes a GPU if there is one.

    Raises:
        ValueError: There is no ``network``, or it has no such label.
    """

    network: Path
    label: str
    top_k: Annotated[int, Field(ge=1)] = 1
    batch_size: Annotated[int, Field(ge=1)] = 16
    device: TorchDevice = "auto"

    @model_validator(mode="after")
    def _label_exists(self) -> "ImageClassifierJudge":
        find_label(self.label, read_labels(self.network))
        return self

    def __call__(self, images: Tensor) -> Verdicts:
        """Judge uint8 pictures [n, 3, H, W]; ``details`` names each picture's most likely ``label``.

        Raises:
            ValueError: The network's files are damaged.
        """
        labels = read_labels(self.network)
        network = load_network(self.network, pick_device(self.device))
        logits = scores_of(images, self.batch_size, network, len(labels))
        return rank_label(logits, logits.softmax(dim=1), labels, find_label(self.label, labels), self.top_k)


@lru_cache(maxsize=8)
def read_labels(network: Path) -> tuple[str, ...]:
    """The labels of a classifier in the order of its logits, without loading it."""
    if network.is_file():
        return tuple(TORCHVISION_FILES[network.name].meta["categories"])
    try:
        names = AutoConfig.from_pretrained(network, trust_remote_code=False).id2label
        return tuple(names[index] for index in range(len(names)))
    except LOADING_ERRORS as error:
        raise ValueError(f"{network} holds no image classifier: {why_unreadable(network, error)}.") from error


@lru_cache(maxsize=4)
def load_network(network: Path, device: torch.device) -> Network:
    """The classifier in a transformers folder or a weights file of torchvision, in float32, loaded once per process.

    Raises:
        ValueError: The files are damaged or of another kind of network.
    """
    try:
        with quiet_off_a_terminal():
            return _from_torchvision(network, device) if network.is_file() else _from_transformers(network, device)
    except LOADING_ERRORS as error:
        raise ValueError(
            f"The classifier in {network} cannot be read; download it again: {why_unreadable(network, error)}."
        ) from error


def _from_transformers(folder: Path, device: torch.device) -> Network:
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForImageClassification.from_pretrained(
        folder, dtype=torch.float32, variant=weights_variant(folder), trust_remote_code=False
    )
    model = model.eval().to(device)

    def logits(images: Tensor) -> Tensor:
        pixels = processor(images=list(images.cpu()), return_tensors="pt").pixel_values
        return model(pixels.to(device)).logits  # type: ignore[no-any-return]

    return logits


def _from_torchvision(file: Path, device: torch.device) -> Network:
    weights = TORCHVISION_FILES[file.name]
    with torch.device("meta"):
        model = resnet50()
    model.load_state_dict(read_network_weights(file), assign=True)
    model.eval().to(device)
    prepare = weights.transforms()

    def logits(images: Tensor) -> Tensor:
        return model(prepare(images.cpu()).to(device))  # type: ignore[no-any-return]

    return logits
