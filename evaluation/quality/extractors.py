"""Features of pictures that distances between sets of pictures are measured on."""

import copy
import io
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

from diffusion.canvas.classifier import CanvasClassifier
from diffusion.checked import checked
from diffusion.files import in_short
from diffusion.weight_files import read_network_weights
from evaluation.judges.canvas import CLASSIFIER_FOLDER, ClassifierFolder, load_classifier
from evaluation.judges.clip import ClipFolder, picture_features
from evaluation.judges.pretrained import TorchDevice, pick_device
from evaluation.quality.weights import weights_file

_BATCH = 32
"""Pictures that go through Inception at a time."""


@runtime_checkable
class Extractor(Protocol):
    """Settings of a feature extractor; equal settings share one network."""

    def load(self) -> "Features":
        """The network."""


class Features(nn.Module):
    """A feature extractor as torchmetrics wants it: uint8 pictures [n, 3, H, W] to [n, num_features].

    The features of the pictures that it saw last are kept, because several distances are measured on the same ones.

    Args:
        extract: Features [n, num_features] of uint8 pictures [n, 3, H, W].
        num_features: How many of a picture.
    """

    def __init__(self, extract: Callable[[Tensor], Tensor], num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        self._extract = extract
        self._last: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features, float [n, num_features] on the CPU, of uint8 ``images`` [n, 3, H, W]."""
        for known, features in self._last:
            if known is images:
                return features
        features = self._extract(images).cpu()
        self._last = [*self._last[-1:], (images, features)]
        return features


@checked
class Classifier:
    """The last hidden layer of the canvas's classifier, in float64.

    Attributes:
        folder: The classifier; null for the shipped one.
    """

    folder: ClassifierFolder = CLASSIFIER_FOLDER

    def load(self) -> Features:
        """See :class:`Extractor`."""
        return _load_classifier(self.folder)


@checked
class Inception:
    """The 2048 pooled features of Inception-v3, with the weights and the resizing of the field (torch-fidelity's).

    Attributes:
        weights: The file; null for what torch-fidelity downloads, where torch's hub keeps it.
        device: ``auto`` takes a GPU if there is one.

    Raises:
        ValueError: The file is not there, or not the published one.
    """

    weights: Annotated[Path, weights_file(URL_INCEPTION_V3)]
    device: TorchDevice = "auto"

    def load(self) -> Features:
        """See :class:`Extractor`."""
        return _load_inception(self.weights, pick_device(self.device))


@checked
class Clip:
    """CLIP's projected picture features, as for CMMD (2401.09603).

    Attributes:
        folder: A CLIP in transformers' format, by its folder or by a Hub id that is in the cache.
        device: ``auto`` takes a GPU if there is one.
    """

    folder: ClipFolder
    device: TorchDevice = "auto"

    def load(self) -> Features:
        """See :class:`Extractor`."""
        return _load_clip(self.folder, pick_device(self.device))


@lru_cache(maxsize=2)
def _load_classifier(folder: Path) -> Features:
    # FID's eigenvalues do not forgive float32.
    classifier: CanvasClassifier = copy.deepcopy(load_classifier(folder)).double()
    return Features(lambda images: classifier.features(images.cpu()), classifier.feature_width)


@lru_cache(maxsize=2)
def _load_inception(weights: Path, device: torch.device) -> Features:
    # Slow to import, together with the plots of its metrics.
    from torchmetrics.image.fid import NoTrainInceptionV3  # noqa: PLC0415

    width = 2048
    # The library unpickles whatever lies in a file, with the code in it: it is given tensors that were read without.
    tensors = io.BytesIO()
    torch.save(read_network_weights(weights), tensors)
    tensors.seek(0)
    try:
        network = NoTrainInceptionV3("inception-v3-compat", [str(width)], tensors).to(device).requires_grad_(False)
    except RuntimeError as error:
        raise ValueError(
            f"{weights} holds no weights of Inception-v3; download it again: {in_short(error)}."
        ) from error
    return Features(lambda images: torch.cat([network(batch.to(device)) for batch in images.split(_BATCH)]), width)


@lru_cache(maxsize=2)
def _load_clip(folder: Path, device: torch.device) -> Features:
    extract = picture_features(folder, device)
    return Features(extract, extract(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).shape[1])
