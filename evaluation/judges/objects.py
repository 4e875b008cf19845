"""Is the object there? A ResNet-50 trained on ImageNet says."""

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator

from diffusion.checked import checked
from evaluation.judges.image_classifier import TORCHVISION_FILES, ImageClassifierJudge
from evaluation.judges.pretrained import find_folder

_REMEDY = (
    "give the folder of an image classifier in transformers' format, such as microsoft/resnet-50, or torchvision's "
    f"weights file {' or '.join(TORCHVISION_FILES)} (from https://download.pytorch.org/models/)"
)


def _find_network(source: object) -> Path:
    file = Path(source).expanduser() if isinstance(source, str | Path) else None
    if file is None or not file.is_file():
        return find_folder(source, _REMEDY)
    # The name says which of the two it is, and each needs its own resizing.
    if file.name not in TORCHVISION_FILES:
        raise ValueError(f"it is {str(source)!r}; {_REMEDY}.")
    return file


@checked
class ObjectJudge(ImageClassifierJudge):
    """The object is present where its ImageNet class is the most likely one, as in UnlearnDiffAtk (2310.11868) and ESD.

    Attributes:
        network: A folder or Hub id of a classifier in transformers' format (``microsoft/resnet-50``, UnlearnDiffAtk's
            and most others'), or a ResNet-50 weights file of torchvision under the name that it has there (ESD's).
    """

    network: Annotated[Path, BeforeValidator(_find_network)]
