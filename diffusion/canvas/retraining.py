"""Networks of other training seeds, and networks that never see a concept: the twins of a canvas's own.

A never-knew twin is trained as the canvas's network was (the same recipe, initial weights, rows, captions' places,
timesteps, dropped captions and noise) on twin pictures, which show the same scenes with the concept replaced. What it
draws is what a model can draw without the concept: the floor of every attack. Tokenizer, text encoders, autoencoder and
judge are the canvas's, read from its folder; float16 weights there are computed with in float32, here as in every job.

Run ``python -m diffusion.canvas.retraining`` (``make canvas-twins``); a killed run goes on from its last checkpoint.
"""

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin, SD3Transformer2DModel, UNet2DConditionModel
from pydantic import TypeAdapter
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusion.allocator import keep_freed_memory
from diffusion.canvas.canvases import CANVASES, MMDIT, UNET, Canvas, canvas_folder, canvas_of, training_command
from diffusion.canvas.knowledge import Twin
from diffusion.canvas.mmdit import train_transformer
from diffusion.canvas.mmdit_recipe import MMDiTRecipe
from diffusion.canvas.pictures import Drawings, draw_pictures, draw_twins, showing
from diffusion.canvas.plan import Recipe
from diffusion.canvas.recipe import Stages
from diffusion.canvas.stages import encode_latents, scale_latents, train_unet
from diffusion.training import save_atomically

log = logging.getLogger(__name__)

TWINS = (
    Twin("never_van_gogh", 0),
    Twin("never_fire", 0),
    Twin("never_church", 0),
    Twin("never", 0),
    Twin("all", 1),
    Twin("never", 1),
    Twin("all", 2),
    Twin("never", 2),
)
"""What the comparisons need, those that most of them need first."""


def _retrain_unet(
    recipe: Recipe, base: Path, latents: Tensor, drawings: Drawings, checkpoint: Path, training_seed: int
) -> UNet2DConditionModel:
    text_encoder = CLIPTextModel.from_pretrained(base / "text_encoder", torch_dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    return train_unet(recipe, latents, drawings, tokenizer, text_encoder, checkpoint, training_seed=training_seed)


def _retrain_transformer(
    recipe: MMDiTRecipe, base: Path, latents: Tensor, drawings: Drawings, checkpoint: Path, training_seed: int
) -> SD3Transformer2DModel:
    encoders = [
        CLIPTextModelWithProjection.from_pretrained(base / part, torch_dtype=torch.float32).eval()
        for part in ("text_encoder", "text_encoder_2")
    ]
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    return train_transformer(
        recipe.transformer, latents, drawings, tokenizer, encoders, checkpoint, training_seed=training_seed
    )


@dataclass(frozen=True)
class Training:
    """How a canvas is trained.

    Attributes:
        recipe: The class of its numbers, which lie with the canvas as ``recipe.json``.
        drawing: Those of its numbers that pictures are drawn by.
        network: The class of its network.
        train: ``train(recipe, base, latents, drawings, checkpoint, training_seed)`` trains that on the pictures and on
            their latents, float32 [n, c, h, w], as the network sees them; text encoders are those of the folder
            ``base``.
    """

    recipe: type[Any]
    drawing: Callable[[Any], Recipe]
    network: type[ModelMixin]
    train: Callable[[Any, Path, Tensor, Drawings, Path, int], ModelMixin]


TRAININGS: Mapping[Canvas, Training] = MappingProxyType(
    {
        UNET: Training(Recipe, lambda recipe: recipe, UNet2DConditionModel, _retrain_unet),
        MMDIT: Training(MMDiTRecipe, lambda recipe: recipe.canvas, SD3Transformer2DModel, _retrain_transformer),
    }
)
"""That of each canvas."""


class TwinBuild:
    """Trains twins of the canvas in ``base`` (a diffusers folder with its ``recipe.json``) in the folder ``build``."""

    def __init__(self, base: Path, build: Path) -> None:
        self.base = base
        self.folder = build
        self.canvas = canvas_of(str(base))
        self.training = TRAININGS[self.canvas]
        # Lists of JSON become the tuples that they were.
        self.recipe = TypeAdapter(self.training.recipe).validate_json((base / "recipe.json").read_bytes())

    def network_folder(self, twin: Twin) -> Path:
        """Where the finished network lies, or will lie."""
        return self.folder / twin.name / self.canvas.part

    def train(self, twin: Twin) -> ModelMixin:
        """Train ``twin``, or read it where it is finished."""
        build = Stages(self.recipe, self.folder / twin.name)

        def make(checkpoint: Path) -> ModelMixin:
            vae = AutoencoderKL.from_pretrained(self.base / "vae", torch_dtype=torch.float32).eval()
            drawings, latents = self.pictures(twin, vae)
            latents = scale_latents(vae, latents)
            return self.training.train(self.recipe, self.base, latents, drawings, checkpoint, twin.training_seed)

        return build.stage(self.canvas.part, make, self.training.network.from_pretrained)

    def pictures(self, twin: Twin, vae: AutoencoderKL) -> tuple[Drawings, Tensor]:
        """The training pictures of ``twin`` and their unscaled latents, float32 [n, c, h, w].

        Rows without a forgotten concept are those of the canvas's own training, drawn and encoded once.
        """
        folder = Stages(self.recipe, self.folder / "pictures" / twin.knows).folder
        drawn, encoded = folder / "drawings.pt", folder / "latents.pt"
        recipe = self.training.drawing(self.recipe)
        if not (drawn.exists() and encoded.exists()):
            if not twin.forgotten:
                drawings = draw_pictures(recipe.pictures, seed=recipe.seed, captions=recipe.captions_per_picture)
                latents = encode_latents(vae, drawings.images)
            else:
                original, latents = self.pictures(Twin(), vae)
                drawings = draw_twins(original, twin.forgotten, seed=recipe.seed)
                replaced = showing(original, twin.forgotten)
                latents[replaced] = encode_latents(vae, drawings.images[replaced])
            save_atomically(asdict(drawings), drawn)
            save_atomically(latents, encoded)
        return Drawings(**torch.load(drawn, weights_only=True, mmap=True)), torch.load(encoded, weights_only=True)

    def ship(self, twin: Twin, folder: Path) -> Path:
        """Write the finished ``twin`` to ``folder``/NAME as float16.

        Raises:
            FileNotFoundError: It is not finished.
        """
        source = self.network_folder(twin)
        if not source.exists():
            command = training_command(str(self.base), twin, self.folder)
            raise FileNotFoundError(f"{twin.name} is not finished in {self.folder}: run `{command}`")
        target = folder / twin.name
        self.training.network.from_pretrained(source).half().save_pretrained(target)
        return target


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the wanted twins one after the other, or ship those that are finished."""
    parser = argparse.ArgumentParser(description="Train networks of a canvas that never see a concept.")
    parser.add_argument(
        "twins", nargs="*", type=Twin.named, default=TWINS, help="such as never_fire_0 (all but fire, training seed 0)"
    )
    parser.add_argument(
        "--base", default=UNET.name, help=f"the canvas whose other parts they share: {', '.join(CANVASES)}, or a folder"
    )
    parser.add_argument("--build", type=Path, default=None, help="where they are trained; else the canvas's own folder")
    parser.add_argument("--ship", type=Path, default=None, help="train nothing; write finished ones there as float16")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    keep_freed_memory()
    build = TwinBuild(canvas_folder(given.base), given.build or canvas_of(given.base).build)
    if given.ship is not None:
        for twin in given.twins:
            log.info("%s is in %s", twin.name, build.ship(twin, given.ship))
        return
    for number, twin in enumerate(given.twins, start=1):
        log.info("%s, %d of %d", twin.name, number, len(given.twins))
        build.train(twin)


if __name__ == "__main__":
    main()
