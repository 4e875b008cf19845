"""Distances between sets of pictures, on features of any extractor, through torchmetrics."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from diffusion.checked import checked
from diffusion.progress import track
from diffusion.streams import stream
from evaluation.picture_files import is_picture_file, neighbours, read_picture_file
from evaluation.prompt_sets import PromptRow
from evaluation.quality import Measures
from evaluation.quality.extractors import Extractor

log = logging.getLogger(__name__)

_BATCH = 128


def _check_reference(folder: Path) -> Path:
    folder = folder.expanduser()
    if not next(_picture_files(folder), None):
        raise ValueError(f"it is {str(folder)!r}; it must be a folder of real pictures (.png, .jpg, .webp, .tif, ...).")
    return folder


Reference = Annotated[Path, AfterValidator(_check_reference)]
"""A folder of real pictures."""


class Distance:
    """Pictures taken so far for a distance between two sets.

    Args:
        metric: A torchmetrics metric of real and generated pictures.
        finish: Its numbers by name.
        reference: Folder of the real pictures; the base model's pictures are, if None.
    """

    def __init__(
        self, metric: Metric, finish: Callable[[Metric, int], Measures], reference: Path | None = None
    ) -> None:
        self._metric = metric
        self._finish = finish
        self._reference = reference
        self._pictures = 0

    def update(self, images: Tensor, reference_images: Tensor, rows: Sequence[PromptRow]) -> None:
        """See :class:`evaluation.quality.Measurement`."""
        self._metric.update(images, real=False)
        if self._reference is None:
            self._metric.update(reference_images, real=True)
        self._pictures += len(images)

    def compute(self) -> Measures:
        """The distance, after the reference pictures are taken."""
        if self._reference is not None:
            for batch in _read(self._reference):
                self._metric.update(batch, real=True)
        return self._finish(self._metric, self._pictures)

    def state(self) -> dict[str, Any]:
        """The metric's own state, and how many pictures it is of."""
        # FID comes in the precision of the features that the metric saw last, which is no part of its state.
        dtype = getattr(self._metric, "orig_dtype", None)
        return {"pictures": self._pictures, "metric": dict(self._metric.metric_state), "dtype": dtype}

    def restore(self, state: dict[str, Any]) -> None:
        """See :class:`evaluation.quality.Measurement`."""
        self._pictures = state["pictures"]
        for name, value in state["metric"].items():
            setattr(self._metric, name, value)
        self._metric._update_count = self._pictures
        self._metric.orig_dtype = state["dtype"]


@checked(arbitrary_types_allowed=True)
class FrechetDistance:
    """FID: the Frechet distance between Gaussians fitted to the features of two sets (Heusel et al. 2017, 1706.08500).

    FID = |mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)). The covariances have rank ``n - 1``: with fewer pictures
    than the features are wide the number is biased upwards, and comparable only at the same ``n``, which goes with it.

    Attributes:
        extractor: Whose features.
        reference: A folder of real pictures, of any size, as for the field's tables; null for the base model's pictures
            of the same prompts and seeds, of which an edit that changes none has distance 0.
        name: What results call it.
    """

    extractor: Extractor
    reference: Reference | None = None
    name: Annotated[str, Field(min_length=1)] = "fid"

    def start(self) -> Distance:
        """Measure ``<name>`` and the number of generated pictures ``<name>_n`` that it comes from."""
        return Distance(FrechetInceptionDistance(feature=self.extractor.load()), self._finish, self.reference)

    def _finish(self, metric: Metric, n: int) -> Measures:
        fewest = min(int(metric.real_features_num_samples), int(metric.fake_features_num_samples))
        if fewest < 2:
            raise ValueError(f"FID of {fewest} pictures does not exist; give two or more of each model.")
        if fewest <= (width := len(metric.real_features_sum)):
            log.info("FID of %d pictures on %d features is biased; compare it at this n only", fewest, width)
        # Rounding can leave a distance of nothing slightly below zero.
        return {self.name: max(0.0, float(metric.compute())), f"{self.name}_n": n}


@checked(arbitrary_types_allowed=True)
class KernelDistance:
    """KID: the unbiased squared MMD of the features of two sets (Binkowski et al. 2018, 1801.01401).

    Its kernel is (x.y / d + 1)^3 of d features, its value the mean over random subsets of both sets. Unlike FID it has
    no bias in the number of pictures.

    Attributes:
        extractor: Whose features.
        subsets: How many.
        subset_size: Pictures in each of the two halves of a subset; fewer where there are fewer pictures.
        seed: Of the subsets.
        reference: As for FID.
        name: What results call it.
    """

    extractor: Extractor
    subsets: Annotated[int, Field(ge=1)] = 100
    subset_size: Annotated[int, Field(ge=2)] = 1000
    seed: Annotated[int, Field(ge=0)] = 0
    reference: Reference | None = None
    name: Annotated[str, Field(min_length=1)] = "kid"

    def start(self) -> Distance:
        """Measure ``<name>``, its standard deviation over subsets ``<name>_std`` and the pictures ``<name>_n``."""
        extractor = self.extractor.load()
        with warnings.catch_warnings():
            # It warns that it keeps all features: 8 KB a picture of Inception's.
            warnings.simplefilter("ignore", UserWarning)
            metric = KernelInceptionDistance(feature=extractor, subsets=self.subsets, subset_size=self.subset_size)
        return Distance(metric, self._finish, self.reference)

    def _finish(self, metric: Metric, n: int) -> Measures:
        fewest = min(sum(map(len, metric.real_features)), sum(map(len, metric.fake_features)))
        if fewest < 2:
            raise ValueError(f"KID of {fewest} pictures does not exist; give two or more of each model.")
        metric.subset_size = min(self.subset_size, fewest)
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(stream(self.seed, "kid/subsets").get_state())
            mean, deviation = metric.compute()
        return {self.name: float(mean), f"{self.name}_std": float(deviation), f"{self.name}_n": n}


def _picture_files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if is_picture_file(path, folder))


def _read(folder: Path) -> Iterator[Tensor]:
    """The pictures of a folder, uint8 [n, 3, H, W], as many of one size at a time as come in a row."""
    paths = list(_picture_files(folder))
    pictures = map(read_picture_file, track(paths, "reference pictures", len(paths)))
    return map(torch.stack, neighbours(pictures, _BATCH, lambda picture: picture))
