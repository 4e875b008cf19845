"""U-Nets of other training seeds, and U-Nets that never see a concept: the twins of the canvas's own.

A never-knew twin is trained as the canvas's U-Net was (the same recipe, initial weights, rows, captions' places,
timesteps, dropped captions and noise) on twin pictures, which show the same scenes with the concept replaced. What it
draws is what a model can draw without the concept: the floor of every attack. Tokenizer, text encoder, autoencoder and
judge are the canvas's, read from its folder; float16 weights there are computed with in float32, here as in every job.

Run ``python -m diffusion.canvas.retraining`` (``make canvas-twins``); a killed run goes on from its last checkpoint.
"""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from pydantic import TypeAdapter
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from diffusion.allocator import keep_freed_memory
from diffusion.canvas.knowledge import BUILD_FOLDER, Twin
from diffusion.canvas.pictures import Drawings, draw_pictures, draw_twins, showing
from diffusion.canvas.plan import Recipe
from diffusion.canvas.recipe import Build
from diffusion.canvas.stages import encode_latents, train_unet
from diffusion.sources import CANVAS_FOLDER
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


class TwinBuild:
    """Trains twins of the canvas in ``base`` (a diffusers folder with its ``recipe.json``) in the folder ``build``."""

    def __init__(self, base: Path, build: Path) -> None:
        self.base = base
        self.folder = build
        # Lists of JSON become the tuples that they were.
        self.recipe = TypeAdapter(Recipe).validate_json((base / "recipe.json").read_bytes())

    def unet_folder(self, twin: Twin) -> Path:
        """Where the finished U-Net lies, or will lie."""
        return self.folder / twin.name / "unet"

    def train(self, twin: Twin) -> UNet2DConditionModel:
        """Train ``twin``, or read it where it is finished."""
        build = Build(self.recipe, self.folder / twin.name)

        def make(checkpoint: Path) -> UNet2DConditionModel:
            vae = AutoencoderKL.from_pretrained(self.base / "vae", torch_dtype=torch.float32)
            text_encoder = CLIPTextModel.from_pretrained(self.base / "text_encoder", torch_dtype=torch.float32).eval()
            tokenizer = CLIPTokenizer.from_pretrained(self.base / "tokenizer")
            drawings, latents = self.pictures(twin, vae.eval())
            latents = latents * vae.config.scaling_factor
            seed = twin.training_seed
            return train_unet(self.recipe, latents, drawings, tokenizer, text_encoder, checkpoint, training_seed=seed)

        return build.stage("unet", make, UNet2DConditionModel.from_pretrained)

    def pictures(self, twin: Twin, vae: AutoencoderKL) -> tuple[Drawings, Tensor]:
        """The training pictures of ``twin`` and their unscaled latents, float32 [n, c, h, w].

        Rows without a forgotten concept are those of the canvas's own training, drawn and encoded once.
        """
        folder = Build(self.recipe, self.folder / "pictures" / twin.knows).folder
        drawn, encoded = folder / "drawings.pt", folder / "latents.pt"
        if not (drawn.exists() and encoded.exists()):
            if not twin.forgotten:
                drawings = draw_pictures(
                    self.recipe.pictures, seed=self.recipe.seed, captions=self.recipe.captions_per_picture
                )
                latents = encode_latents(vae, drawings.images)
            else:
                original, latents = self.pictures(Twin(), vae)
                drawings = draw_twins(original, twin.forgotten, seed=self.recipe.seed)
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
        source = self.unet_folder(twin)
        if not source.exists():
            raise FileNotFoundError(f"{twin.name} is not finished in {self.folder}: run `{twin.command(self.folder)}`")
        target = folder / twin.name
        UNet2DConditionModel.from_pretrained(source).half().save_pretrained(target)
        return target


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the wanted twins one after the other, or ship those that are finished."""
    parser = argparse.ArgumentParser(description="Train U-Nets of the canvas that never see a concept.")
    parser.add_argument(
        "twins", nargs="*", type=Twin.named, default=TWINS, help="such as never_fire_0 (all but fire, training seed 0)"
    )
    parser.add_argument("--base", type=Path, default=CANVAS_FOLDER, help="the canvas whose other parts they share")
    parser.add_argument("--build", type=Path, default=BUILD_FOLDER, help="where they are trained")
    parser.add_argument("--ship", type=Path, default=None, help="train nothing; write finished ones there as float16")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    keep_freed_memory()
    build = TwinBuild(given.base, given.build)
    if given.ship is not None:
        for twin in given.twins:
            log.info("%s is in %s", twin.name, build.ship(twin, given.ship))
        return
    for number, twin in enumerate(given.twins, start=1):
        log.info("%s, %d of %d", twin.name, number, len(given.twins))
        build.train(twin)


if __name__ == "__main__":
    main()
