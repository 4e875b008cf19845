"""A canvas as a choice of model: with what it knows and the seed of its training."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator
from safetensors.torch import load_file
from torch import Tensor, nn

from diffusion.canvas.canvases import WEIGHTS_FILE, canvas_folder, canvas_of, network_folder
from diffusion.canvas.knowledge import Knowledge, Twin
from diffusion.checked import checked
from diffusion.files import in_short
from diffusion.loading import ModelSource
from diffusion.model import TextToImage
from diffusion.sources import CANVAS
from diffusion.weight_files import LOADING_ERRORS


def read_weights(folder: Path, network: nn.Module) -> dict[str, Tensor]:
    """The weights in ``folder``, by name, without what ``network`` has and does not learn, as a table of positions.

    Raises:
        ValueError: They are damaged.
    """
    try:
        stored = load_file(folder / WEIGHTS_FILE)
    except LOADING_ERRORS as error:
        raise ValueError(f"The network in {folder} cannot be read; restore its files: {in_short(error)}.") from error
    constants = dict(network.named_buffers())
    return {name: value for name, value in stored.items() if name not in constants}


@checked
class CanvasSource(ModelSource):
    """A canvas, or one with a network trained like its own from another seed or without a concept.

    See :class:`ModelSource`.

    Attributes:
        source: ``canvas``, ``canvas_mmdit``, or a folder that the recipe of one of them shipped.
        knows: What its network was shown in training.
        training_seed: Of the network's training; 0 is the canvas's own.
        build: Folder of networks that are not shipped, where they were trained; None for the canvas's own.

    Raises:
        FileNotFoundError: No network of this knowledge and seed was trained.
    """

    source: str = CANVAS
    knows: Knowledge = "all"
    training_seed: Annotated[int, Field(ge=0)] = 0
    build: str | None = None

    @model_validator(mode="after")
    def _is_trained(self) -> "CanvasSource":
        if self.twin != Twin():
            self.network_folder()
        return self

    @classmethod
    def as_measured(cls, source: str, **fields: Any) -> "CanvasSource":
        """A canvas with the sampler that it is measured with, and other ``fields`` as they are given."""
        return cls(source, **{"scheduler": canvas_of(source).scheduler, "t5_tokens": 0, **fields})

    @property
    def twin(self) -> Twin:
        """Which network is wanted."""
        return Twin(self.knows, self.training_seed)

    def network_folder(self) -> Path:
        """Where that lies.

        Raises:
            FileNotFoundError: It was not trained.
        """
        return network_folder(self.source, self.twin, self.build)

    def load(self) -> TextToImage:
        """Load the model.

        Raises:
            FileNotFoundError: See :class:`ModelSource`; or the canvas is not there.
            ValueError: See there; or the network's file is damaged or of other shapes than the canvas's.
        """
        name = self.name or Path(self.source).name
        model = super(CanvasSource, replace(self, source=str(canvas_folder(self.source)), name=name)).load()
        if self.twin == Twin():
            return model
        folder, constants = self.network_folder(), dict(model.network.named_buffers())
        kept = {name: value for name, value in model.network.state_dict().items() if name in constants}
        try:
            model.network.load_state_dict(read_weights(folder, model.network) | kept)
        except RuntimeError as error:
            raise ValueError(f"The network in {folder} is no twin of {self.source}: {in_short(error)}.") from error
        if self.name is None:
            model.name = f"{name}_{self.twin.name}"
        return model
