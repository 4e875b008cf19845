"""Is the concept there? CLIP compares the picture with texts that say so and texts that do not."""

from typing import Annotated

from pydantic import Field, model_validator
from torch import Tensor

from diffusion.checked import checked
from diffusion.loading import Device
from evaluation.judges.clip import ClipFolder, picture_features, text_features
from evaluation.judges.pretrained import TorchDevice, pick_device, scores_of
from evaluation.verdicts import Verdicts

Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[tuple[Text, ...], Field(min_length=1)]


@checked
class ClipZeroShot:
    """Says that the concept is present where the most fitting of all texts is one of ``present``.

    softmax(s cos(E_picture, E_text)) over all texts, s being CLIP's logit scale (2103.00020, section 3.1.2); the score
    is the sum over the texts of ``present``.

    Attributes:
        present: What fits a picture with the concept.
        absent: What fits a picture without it: the more there is to choose from, the surer the verdict.
        folder: A CLIP in transformers' format, by folder or Hub id; ``canvas`` for the shipped one.
        batch_size: Pictures at a time; no effect on results.
        device: ``auto`` takes a GPU if there is one.

    Raises:
        ValueError: A text is on both sides, or there is no CLIP in ``folder``.
    """

    present: Texts
    absent: Texts
    folder: ClipFolder
    batch_size: Annotated[int, Field(ge=1)] = 16
    device: TorchDevice = "auto"

    @model_validator(mode="after")
    def _sides_differ(self) -> "ClipZeroShot":
        if both := set(self.present) & set(self.absent):
            raise ValueError(f"{min(both)!r} is a text of both present and absent; it can be one of them.")
        return self

    def __call__(self, images: Tensor) -> Verdicts:
        """Judge uint8 pictures [n, 3, H, W]; ``details`` names each picture's most fitting ``text``."""
        texts = self.present + self.absent
        probabilities = text_probabilities(images, texts, self.folder, self.batch_size, self.device)
        best = probabilities.argmax(dim=1)
        return Verdicts(
            present=best < len(self.present),
            score=probabilities[:, : len(self.present)].sum(dim=1).clamp(max=1),
            details={"text": [texts[index] for index in best.tolist()]},
        )


def text_probabilities(
    images: Tensor, texts: tuple[str, ...], folder: ClipFolder, batch_size: int, device: Device
) -> Tensor:
    """How well each text fits, softmax over texts, float32 [n, texts], of uint8 ``images`` [n, 3, H, W]."""
    place = pick_device(device)
    features, wanted = picture_features(folder, place), text_features(folder, place, texts)
    return scores_of(images, batch_size, lambda batch: (features(batch) @ wanted.T).softmax(dim=1), len(texts))
