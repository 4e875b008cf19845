"""Retrained: the model that never knew the concept, which erasing would like to arrive at."""

from dataclasses import field
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffusion.canvas.canvases import WEIGHTS_FILE, canvas_of, network_folder
from diffusion.canvas.knowledge import FORGOTTEN, Twin
from diffusion.canvas.source import read_weights
from diffusion.checked import checked
from diffusion.model import TextToImage
from diffusion.sources import CANVAS
from erasure.concept import Concept
from erasure.edit import Edit
from erasure.finetuning import prune_after
from erasure.parameters import UNetScope
from erasure.protocols import Erasure, Pruning


@checked
class Retrained:
    """Exact unlearning: theta becomes what the same training gives on pictures that lack the concept.

    theta* = train(theta_0, D'), where theta = train(theta_0, D), D' is D with the concept replaced in every picture
    that shows it, and both trainings share initial weights theta_0, order and noise: the twin of
    :mod:`diffusion.canvas.retraining`. It costs a training, so only the canvases have it.

    Attributes:
        knows: What the twin was shown; ``never_`` and the concept's name, or ``never`` for none of the canvas's three.
        source: The model whose twin it is.
        training_seed: Of the training of both.
        build: Folder of twins that are not shipped; None for the canvas's own.
        scope: What a pruning strategy without a scope of its own prunes.
        weights: The twin's, found by the other fields.

    Raises:
        FileNotFoundError: The twin was not trained.
        ValueError: The concept or the model is none that has a twin.
    """

    has_objective: ClassVar[bool] = False

    knows: str
    source: str = CANVAS
    training_seed: Annotated[int, Field(ge=0)] = 0
    build: str | None = None
    scope: UNetScope = "xattn"
    weights: Path = field(init=False)

    @model_validator(mode="after")
    def _find(self) -> "Retrained":
        if not FORGOTTEN.get(self.knows):
            allowed = ", ".join(knows for knows, forgotten in FORGOTTEN.items() if forgotten)
            raise ValueError(f"knows is {self.knows!r}; models were retrained for {allowed}.")
        # A path, so that results depend on the weights that lie there.
        object.__setattr__(self, "weights", self._folder(Twin(self.knows, self.training_seed)) / WEIGHTS_FILE)
        return self

    def _folder(self, twin: Twin) -> Path:
        return network_folder(self.source, twin, self.build)

    def erase(
        self, model: TextToImage, concept: Concept, pruning: Pruning, *, seed: int, checkpoint: Path | None = None
    ) -> Erasure:
        """See :class:`erasure.protocols.Eraser`.

        Raises:
            ValueError: ``model`` is not the one that knows all, or the twin does not fit it.
        """
        before: dict[str, Tensor] = dict(model.network.named_parameters())
        base, canvas = Twin("all", self.training_seed), canvas_of(self.source)
        if not _same(read_weights(self._folder(base), model.network), before):
            raise ValueError(
                f"eraser=retrained leads from the canvas that knows all with training seed {self.training_seed} to its "
                f"twin, and the network of {model.name!r} is another; take model={canvas.name} model.knows=all "
                f"model.training_seed={self.training_seed}."
            )
        twin = read_weights(self.weights.parent, model.network)
        if {name: value.shape for name, value in twin.items()} != {name: value.shape for name, value in before.items()}:
            raise ValueError(f"The network in {self.weights} has other tensors than that of {model.name!r}.")
        after = {name: value.to(before[name]) for name, value in twin.items()}
        erasure = Erasure(Edit.from_weights(before, after), [], 0)
        return prune_after(erasure, self, pruning, model, concept, scope=self.scope, seed=seed, checkpoint=checkpoint)


def _same(stored: dict[str, Tensor], weights: dict[str, Tensor]) -> bool:
    return stored.keys() == weights.keys() and all(
        torch.equal(value.to(weights[name]), weights[name]) for name, value in stored.items()
    )
