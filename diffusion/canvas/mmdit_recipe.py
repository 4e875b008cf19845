"""How the canvas's transformer was made: the second architecture, on the canvas's own pictures, on a CPU.

Tokenizer and first text encoder are the canvas's. Stages, each resumable and each kept in the build folder:

1. ``pictures``     the canvas's drawings, and for a twin those without its concepts
2. ``clip``         a second, narrower CLIP, whose text half is the second text encoder
3. ``vae``          an ``AutoencoderKL`` of 16 channels without convolutions around the latents, as Stable Diffusion 3's
4. ``transformer``  an ``SD3Transformer2DModel``, trained by flow matching; one for each twin

Run ``python -m diffusion.canvas.mmdit_recipe`` (``make canvas-mmdit``).
"""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from transformers import CLIPModel, CLIPTokenizer

from diffusion.allocator import keep_freed_memory
from diffusion.canvas.knowledge import Twin
from diffusion.canvas.mmdit import TransformerRecipe, assemble, text_half, train_transformer
from diffusion.canvas.pictures import Drawings, draw_twins, showing
from diffusion.canvas.plan import Recipe
from diffusion.canvas.recipe import Build, Stages
from diffusion.canvas.stages import encode_latents, train_clip, train_vae
from diffusion.sources import CANVAS_FOLDER

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MMDiTRecipe:
    """Every number of the training.

    Attributes:
        canvas: The pictures, the second CLIP (whose width ``text_width`` is) and the autoencoder.
        transformer: The transformer.
    """

    canvas: Recipe = field(default_factory=lambda: Recipe(text_width=96, latent_channels=16, vae_steps=2500))
    transformer: TransformerRecipe = field(default_factory=TransformerRecipe)


class MMDiTBuild(Stages):
    """The stages of the transformers, of which there is one for each twin.

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

    def clips(self) -> tuple[CLIPModel, CLIPModel]:
        """The canvas's CLIP, and the second."""
        recipe, tokenizer = self.recipe.canvas, self.tokenizer()
        first = CLIPModel.from_pretrained(self.base / "clip", torch_dtype=torch.float32)
        second = self.stage(
            "clip", lambda path: train_clip(recipe, self.drawings(), tokenizer, path), CLIPModel.from_pretrained
        )
        return first, second

    def vae(self) -> AutoencoderKL:
        """The autoencoder."""
        return self.stage(
            "vae",
            lambda path: train_vae(self.recipe.canvas, self.drawings(), path, shifted=True),
            AutoencoderKL.from_pretrained,
        )

    def transformer(self, twin: Twin) -> SD3Transformer2DModel:
        """The transformer of ``twin``."""
        encoders = [text_half(clip) for clip in self.clips()]
        vae = self.vae()

        def make(checkpoint: Path) -> SD3Transformer2DModel:
            drawings = self.drawings()
            latents = self.pictures.latents(vae, drawings)
            if twin.forgotten:
                replaced = showing(drawings, twin.forgotten)
                drawings = draw_twins(drawings, twin.forgotten, seed=self.recipe.canvas.seed)
                latents[replaced] = encode_latents(vae, drawings.images[replaced])
            latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
            return train_transformer(self.recipe.transformer, latents, drawings, self.tokenizer(), encoders, checkpoint)

        return self.stage(twin.name, make, SD3Transformer2DModel.from_pretrained)

    def tokenizer(self) -> CLIPTokenizer:
        """The canvas's."""
        return CLIPTokenizer.from_pretrained(self.base / "tokenizer")  # type: ignore[no-any-return]

    def drawings(self) -> Drawings:
        """The canvas's training pictures."""
        return self.pictures.drawings()

    def ship(self, folder: Path) -> None:
        """Write the model that knows all to ``folder`` as float16: a Stable Diffusion 3 folder without a T5."""
        encoders = [text_half(clip).half() for clip in self.clips()]
        vae, transformer = self.vae().half(), self.transformer(Twin()).half()
        assemble(vae, transformer, self.tokenizer(), encoders).save_pretrained(folder)
        for config in folder.glob("text_encoder*/config.json"):
            # transformers loads in the precision named here; computing in float16 is not what a CPU should do.
            config.write_text(config.read_text().replace("float16", "float32"))
        (folder / "recipe.json").write_text((self.folder / "recipe.json").read_text())


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the wanted stages, or ship what is finished."""
    parser = argparse.ArgumentParser(description="Train and ship the canvas's transformer.")
    parser.add_argument(
        "twins", nargs="*", type=Twin.named, default=[Twin()], help="such as all_0 or never_fire_0 (all but fire)"
    )
    parser.add_argument("--build", type=Path, default=Path("build/canvas_mmdit"), help="where stages are kept")
    parser.add_argument("--ship", type=Path, default=None, help="where the finished folder goes")
    parser.add_argument("--only", choices=("clip", "vae"), default=None, help="train this stage and no transformer")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    keep_freed_memory()
    build = MMDiTBuild(MMDiTRecipe(), given.build)
    if given.only is not None:
        {"clip": build.clips, "vae": build.vae}[given.only]()
        return
    for number, twin in enumerate(given.twins, start=1):
        log.info("%s, %d of %d", twin.name, number, len(given.twins))
        build.transformer(twin)
    if given.ship is not None:
        build.ship(given.ship)


if __name__ == "__main__":
    main()
