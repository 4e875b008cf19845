"""FID: how far the pictures of the edited model lie from those of the base model (Heusel et al. 2017, 1706.08500)."""

import copy
import logging
from collections.abc import Sequence

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from diffusion.canvas.classifier import CanvasClassifier
from evaluation.judges.canvas import CLASSIFIER_FOLDER, ClassifierFolder, load_classifier
from evaluation.prompt_sets import PromptRow
from evaluation.quality import Measures

log = logging.getLogger(__name__)

_BATCH = 256


class ClassifierFeatures(nn.Module):
    """The classifier's features, as torchmetrics wants a feature extractor: uint8 pictures to [n, num_features].

    Args:
        classifier: Its trunk is shared, in float64: FID's eigenvalues do not forgive float32.
    """

    def __init__(self, classifier: CanvasClassifier) -> None:
        super().__init__()
        self.classifier = copy.deepcopy(classifier).double()
        self.num_features = classifier.feature_width

    def forward(self, images: Tensor) -> Tensor:
        """Features, float64 [n, num_features], of uint8 ``images`` [n, 3, H, W]."""
        return self.classifier.features(images)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Fid:
    """Frechet distance between Gaussians fitted to features of the base and the edited model's pictures.

    FID = |mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)), through torchmetrics, on the features of the canvas
    classifier instead of Inception's. Both sets come from the same retained prompts and seeds, so an edit that
    changes no picture has 0. The covariances have rank ``n - 1``: with fewer pictures than the features are wide
    the number is biased upwards, and comparable only at the same ``n``, which is stored with it.

    Attributes:
        folder: The classifier; null for the shipped one.
    """

    folder: ClassifierFolder = CLASSIFIER_FOLDER

    @torch.no_grad()
    def distance(self, images: Tensor, reference_images: Tensor) -> float:
        """FID between two sets of uint8 pictures [n, 3, H, W].

        Raises:
            ValueError: A set has fewer than two pictures.
        """
        fewest = min(len(images), len(reference_images))
        if fewest < 2:
            raise ValueError(f"FID of {fewest} pictures does not exist; give two or more of each model.")
        features = ClassifierFeatures(load_classifier(self.folder))
        if fewest <= features.num_features:
            log.info(
                "FID of %d pictures on %d features is biased; compare it at this n only", fewest, features.num_features
            )
        metric = FrechetInceptionDistance(feature=features)
        for pictures, real in ((reference_images, True), (images, False)):
            for chunk in pictures.cpu().split(_BATCH):
                metric.update(chunk, real=real)
        # Rounding can leave a distance of nothing slightly below zero.
        return max(0.0, float(metric.compute()))

    def __call__(self, images: Tensor, reference_images: Tensor, rows: Sequence[PromptRow]) -> Measures:
        """``fid`` and the number of pictures ``fid_n`` that it comes from."""
        return {"fid": self.distance(images, reference_images), "fid_n": len(images)}
