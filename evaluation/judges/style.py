"""Whose style is it? A classifier of artists says, or CLIP where there is none."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator
from torch import Tensor

from diffusion.checked import checked
from evaluation.judges.clip import ClipFolder
from evaluation.judges.clip_zeroshot import Text, text_probabilities
from evaluation.judges.image_classifier import ImageClassifierJudge
from evaluation.judges.labels import find_label, rank_label
from evaluation.judges.pretrained import TorchDevice, local_folder
from evaluation.verdicts import Verdicts


@checked
class StyleJudge(ImageClassifierJudge):
    """The style is present where its artist is among the ``top_k`` most likely, as in UnlearnDiffAtk (2310.11868).

    Attributes:
        network: Folder of a classifier of artists in transformers' format; UnlearnDiffAtk's is a ViT that tells 129
            artists of WikiArt apart, in the folder results/checkpoint-2800 of the drive that its README names.
    """

    network: Annotated[
        Path,
        local_folder(
            "give the folder of a classifier of artists, such as UnlearnDiffAtk's (download results/checkpoint-2800 "
            "from the drive that github.com/OPTML-Group/Diffusion-MU-Attack names), or take judge=style_clip"
        ),
    ]


@checked
class StyleByClip:
    """The style is present where, by CLIP, its artist's name fits among the ``top_k`` best of ``artists``.

    Attributes:
        label: The artist, as :func:`~evaluation.judges.labels.find_label` finds it among ``artists``.
        artists: Names of artists.
        template: What says of a picture that it is by the artist ``{}``.
        top_k: How many of the best count.
        folder: A CLIP in transformers' format, by folder or Hub id.
        batch_size: Pictures at a time; no effect on results.
        device: ``auto`` takes a GPU if there is one.

    Raises:
        ValueError: ``artists`` has no such label, ``template`` no {}, or there is no CLIP in ``folder``.
    """

    label: str
    artists: Annotated[tuple[Text, ...], Field(min_length=2)]
    template: Annotated[str, Field(pattern=r"\{\}")]
    folder: ClipFolder
    top_k: Annotated[int, Field(ge=1)] = 1
    batch_size: Annotated[int, Field(ge=1)] = 16
    device: TorchDevice = "auto"

    @model_validator(mode="after")
    def _label_exists(self) -> "StyleByClip":
        find_label(self.label, self.artists)
        return self

    def __call__(self, images: Tensor) -> Verdicts:
        """Judge uint8 pictures [n, 3, H, W]; ``details`` names each picture's best ``label``."""
        texts = tuple(self.template.replace("{}", artist) for artist in self.artists)
        probabilities = text_probabilities(images, texts, self.folder, self.batch_size, self.device)
        return rank_label(probabilities, probabilities, self.artists, find_label(self.label, self.artists), self.top_k)
