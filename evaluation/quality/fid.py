"""FID on the features of the canvas's classifier, in place of Inception's."""

from torch import Tensor

from diffusion.checked import checked
from evaluation.judges.canvas import CLASSIFIER_FOLDER, ClassifierFolder
from evaluation.quality import measure
from evaluation.quality.distances import Distance, FrechetDistance
from evaluation.quality.extractors import Classifier


@checked
class Fid:
    """:class:`evaluation.quality.distances.FrechetDistance` between the base and the edited model's pictures.

    Attributes:
        folder: The classifier; null for the shipped one.
    """

    folder: ClassifierFolder = CLASSIFIER_FOLDER

    def distance(self, images: Tensor, reference_images: Tensor) -> float:
        """FID between two sets of uint8 pictures [n, 3, H, W].

        Raises:
            ValueError: A set has fewer than two pictures.
        """
        return float(measure(self._settings, images, reference_images, [])["fid"])  # type: ignore[arg-type]

    def start(self) -> Distance:
        """Measure ``fid`` and the number of pictures ``fid_n`` that it comes from."""
        return self._settings.start()

    @property
    def _settings(self) -> FrechetDistance:
        return FrechetDistance(Classifier(self.folder))
