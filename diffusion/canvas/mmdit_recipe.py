"""How the canvas's transformer was made: the second architecture, on the canvas's own pictures, on a CPU.

Tokenizer and first text encoder are the canvas's. Stages, each resumable and each kept in the build folder:

1. ``pictures``     the canvas's drawings
2. ``clip``         a second, narrower CLIP, whose text half is the second text encoder
3. ``vae``          an ``AutoencoderKL`` of 16 channels without convolutions around the latents, as Stable Diffusion 3's
4. ``transformer``  an ``SD3Transformer2DModel``, trained by flow matching

Run ``python -m diffusion.canvas.mmdit_recipe`` (``make canvas-mmdit``); ``--quick`` makes a tiny one that only proves
the path. Twins are made by ``diffusion.canvas.retraining``.
"""

import argparse
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from transformers import CLIPModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusion.allocator import keep_freed_memory
from diffusion.canvas.mmdit import TransformerRecipe, assemble, text_half, train_transformer
from diffusion.canvas.plan import QUICK, Recipe
from diffusion.canvas.recipe import Build, Stages
from diffusion.canvas.stages import scale_latents, train_clip, train_vae
from diffusion.sources import CANVAS_FOLDER

STAGES = ("clip", "vae", "transformer")
"""What can be trained by itself, in order."""


@dataclass(frozen=True)
class MMDiTRecipe:
    """Every number of the training.

    Attributes:
        canvas: The pictures, the second CLIP (whose width ``text_width`` is) and the autoencoder.
        transformer: The transformer.
    """

    canvas: Recipe = field(default_factory=lambda: Recipe(text_width=96, latent_channels=16, vae_steps=2500))
    transformer: TransformerRecipe = field(default_factory=TransformerRecipe)


QUICK_MMDIT = MMDiTRecipe(
    replace(QUICK, text_layers=2, latent_channels=16),
    # Its few steps lie in the warm-up, and must lead away from the blocks that do nothing.
    TransformerRecipe(width=32, layers=2, positions=8, steps=3, batch=8, learning_rate=0.5),
)
"""The whole path in seconds; its pictures are noise."""


class MMDiTBuild(Stages):
    """The stages of the canvas's transformer; see :class:`Stages`.

    Args:
        recipe: The numbers.
        folder: Where the stages are kept.
        base: The canvas whose tokenizer and text encoder are the first ones.
    """

    def __init__(self, recipe: MMDiTRecipe, folder: Path, base: Path = CANVAS_FOLDER) -> None:
        super().__init__(recipe, folder)
        self.recipe = recipe
        self.base = base
        self.pictures = Build(recipe.canvas, folder / "pictures")

    def run(self, stages: Collection[str] = STAGES) -> None:
        """Run the wanted stages in order; each reads what the earlier ones have left in the folder."""
        canvas, tokenizer, drawings = self.recipe.canvas, self.tokenizer(), self.pictures.drawings()
        if "clip" in stages:
            self.stage("clip", lambda path: train_clip(canvas, drawings, tokenizer, path), CLIPModel.from_pretrained)
        if "vae" in stages:
            self.stage(
                "vae", lambda path: train_vae(canvas, drawings, path, shifted=True), AutoencoderKL.from_pretrained
            )
        if "transformer" in stages:
            self.stage("transformer", self._train_transformer, SD3Transformer2DModel.from_pretrained)

    def ship(self, folder: Path) -> None:
        """Write the finished stages to ``folder`` as float16: a Stable Diffusion 3 folder without a T5."""
        transformer = SD3Transformer2DModel.from_pretrained(self._finished("transformer")).half()
        encoders = [encoder.half() for encoder in self._encoders()]
        assemble(self._vae().half(), transformer, self.tokenizer(), encoders).save_pretrained(folder)
        self.describe(folder, "text_encoder", "text_encoder_2")

    def tokenizer(self) -> CLIPTokenizer:
        """The canvas's."""
        return CLIPTokenizer.from_pretrained(self.base / "tokenizer")  # type: ignore[no-any-return]

    def _train_transformer(self, checkpoint: Path) -> SD3Transformer2DModel:
        vae, encoders, drawings = self._vae(), self._encoders(), self.pictures.drawings()
        latents = scale_latents(vae, self.pictures.latents(vae, drawings))
        return train_transformer(self.recipe.transformer, latents, drawings, self.tokenizer(), encoders, checkpoint)

    def _vae(self) -> AutoencoderKL:
        return AutoencoderKL.from_pretrained(self._finished("vae"))

    def _encoders(self) -> list[CLIPTextModelWithProjection]:
        """The text halves of the canvas's CLIP and of the second one."""
        first = CLIPModel.from_pretrained(self.base / "clip", torch_dtype=torch.float32)
        return [text_half(clip) for clip in (first, CLIPModel.from_pretrained(self._finished("clip")))]

    def _finished(self, stage: str) -> Path:
        folder = self.folder / stage
        if not folder.exists():
            raise FileNotFoundError(
                f"The stage {stage} is not finished in {self.folder}; train it with --stages {stage}."
            )
        return folder


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the canvas's transformer."""
    parser = argparse.ArgumentParser(description="Train and ship the canvas's transformer.")
    parser.add_argument("--quick", action="store_true", help="a tiny one in seconds that only proves the path")
    parser.add_argument(
        "--build", type=Path, default=Path("build/canvas_mmdit"), help="where stages and checkpoints are kept"
    )
    parser.add_argument("--base", type=Path, default=CANVAS_FOLDER, help="whose tokenizer and text encoder it has")
    parser.add_argument("--ship", type=Path, default=None, help="where the finished folder goes")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="train these only")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    keep_freed_memory()
    build = MMDiTBuild(QUICK_MMDIT if given.quick else MMDiTRecipe(), given.build, given.base)
    build.run(given.stages)
    if given.ship is not None:
        build.ship(given.ship)


if __name__ == "__main__":
    main()
