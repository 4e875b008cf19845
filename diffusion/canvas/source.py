"""The canvas as a choice of model: with what it knows and the seed of its training."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator
from safetensors.torch import load_file
from torch import Tensor

from diffusion.canvas.knowledge import BUILD_FOLDER, Knowledge, Twin
from diffusion.checked import checked
from diffusion.files import in_short
from diffusion.loading import ModelSource
from diffusion.model import TextToImage
from diffusion.sources import CANVAS, CANVAS_FOLDER
from diffusion.weight_files import LOADING_ERRORS

UNET_FILE = "diffusion_pytorch_model.safetensors"
"""What diffusers calls a U-Net's weights."""


def canvas_folder(source: str) -> Path:
    """The folder that a canvas's ``source`` names."""
    return CANVAS_FOLDER if source == CANVAS else Path(source).expanduser()


def read_unet(folder: Path) -> dict[str, Tensor]:
    """The weights of the U-Net in ``folder``, by name.

    Raises:
        ValueError: They are damaged.
    """
    try:
        return load_file(folder / UNET_FILE)
    except LOADING_ERRORS as error:
        raise ValueError(f"The U-Net in {folder} cannot be read; restore its files: {in_short(error)}.") from error


@checked
class CanvasSource(ModelSource):
    """The canvas, or a U-Net trained like its own from another seed or without a concept; see :class:`ModelSource`.

    Attributes:
        knows: What its U-Net was shown in training.
        training_seed: Of the U-Net's training; 0 is the canvas's own.
        build: Folder of U-Nets that are not shipped, where they were trained.

    Raises:
        FileNotFoundError: No U-Net of this knowledge and seed was trained.
    """

    source: str = CANVAS
    knows: Knowledge = "all"
    training_seed: Annotated[int, Field(ge=0)] = 0
    build: str = str(BUILD_FOLDER)

    @model_validator(mode="after")
    def _is_trained(self) -> "CanvasSource":
        if self.twin != Twin():
            self.unet_folder()
        return self

    @property
    def twin(self) -> Twin:
        """Which U-Net is wanted."""
        return Twin(self.knows, self.training_seed)

    def unet_folder(self) -> Path:
        """Where that lies.

        Raises:
            FileNotFoundError: It was not trained.
        """
        return self.twin.unet_folder(Path(self.build).expanduser(), canvas_folder(self.source))

    def load(self) -> TextToImage:
        """Load the model.

        Raises:
            FileNotFoundError: See :class:`ModelSource`.
            ValueError: See there; or the U-Net's file is damaged or of other shapes than the canvas's.
        """
        model = super().load()
        if self.twin == Twin():
            return model
        folder = self.unet_folder()
        try:
            model.unet.load_state_dict(read_unet(folder))
        except RuntimeError as error:
            raise ValueError(f"The U-Net in {folder} is no twin of {self.source}: {in_short(error)}.") from error
        if self.name is None:
            model.name = f"{model.name}_{self.twin.name}"
        return model
