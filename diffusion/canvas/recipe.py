"""How the canvas was made: from nothing to a Stable Diffusion folder, with fixed seeds, on a CPU.

Stages, each resumable and each kept in the build folder:

1. ``pictures``    scenes drawn at random, with several captions each
2. ``tokenizer``   a byte-pair vocabulary in CLIP's format, trained on those captions
3. ``clip``        a small CLIP, trained contrastively; its text half conditions the U-Net
4. ``vae``         an ``AutoencoderKL``
5. ``classifier``  the judge's network, on pictures and on their reconstructions
6. ``unet``        epsilon prediction on the VAE's latents, with dropped captions for guidance

Run ``python -m diffusion.canvas.recipe`` (``make canvas``); ``--quick`` makes a tiny one that only proves the path.
U-Nets of other training seeds, and those that never see a concept, are made by ``diffusion.canvas.retraining``; the
canvas of the other architecture by ``diffusion.canvas.mmdit_recipe``.
"""

import argparse
import json
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from diffusion.allocator import keep_freed_memory
from diffusion.canvas.classifier import CanvasClassifier
from diffusion.canvas.pictures import Drawings, draw_pictures
from diffusion.canvas.plan import QUICK, TOKENS, Recipe, make_scheduler
from diffusion.canvas.stages import (
    decode_latents,
    encode_latents,
    scale_latents,
    train_classifier,
    train_clip,
    train_unet,
    train_vae,
)
from diffusion.canvas.vocabulary import train_tokenizer
from diffusion.canvas.world import IMAGE_SIZE
from diffusion.training import save_atomically

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

log = logging.getLogger(__name__)

STAGES = ("clip", "vae", "classifier", "unet")
"""What can be trained by itself, in order."""


class Stage(Protocol):
    """A network that writes itself to a folder."""

    def save_pretrained(self, save_directory: Path) -> object:
        """Write configuration and weights."""


Saved = TypeVar("Saved", bound=Stage)


class Stages:
    """Trains the stages of a recipe in a folder; a finished stage is read back instead of trained again.

    Args:
        recipe: A dataclass that holds every number of the training.
        folder: Where stages and checkpoints are kept.

    Raises:
        ValueError: The folder was begun with another recipe.
    """

    def __init__(self, recipe: "DataclassInstance", folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        recorded = folder / "recipe.json"
        described = json.dumps(asdict(recipe), indent=2) + "\n"
        if recorded.exists() and recorded.read_text() != described:
            raise ValueError(f"{folder} was begun with another recipe; name another folder or remove it.")
        recorded.write_text(described)

    def stage(self, name: str, make: Callable[[Path], Saved], load: Callable[[Path], Saved]) -> Saved:
        """Read the stage ``name`` from its folder; if it is not there, ``make(checkpoint)`` it and save it there."""
        folder = self.folder / name
        if not folder.exists():
            log.info("training %s", name)
            start = time.monotonic()
            partial = self.folder / f"{name}.partial"
            make(self.folder / f"{name}.checkpoint").save_pretrained(partial)
            (partial / "seconds.txt").write_text(f"{time.monotonic() - start:.0f}\n")
            partial.rename(folder)
        return load(folder)

    def describe(self, folder: Path, *encoders: str) -> None:
        """Put the recipe into the shipped ``folder``, and say that its ``encoders`` are computed in float32."""
        for encoder in encoders:
            # transformers loads in the precision named here; computing in float16 is not what a CPU should do.
            config = folder / encoder / "config.json"
            config.write_text(config.read_text().replace("float16", "float32"))
        (folder / "recipe.json").write_text((self.folder / "recipe.json").read_text())


class Build(Stages):
    """The stages of the canvas; see :class:`Stages`."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        super().__init__(recipe, folder)
        self.recipe = recipe

    def drawings(self) -> Drawings:
        """The training pictures."""
        path = self.folder / "drawings.pt"
        if not path.exists():
            drawn = draw_pictures(
                self.recipe.pictures, seed=self.recipe.seed, captions=self.recipe.captions_per_picture
            )
            save_atomically(asdict(drawn), path)
        return Drawings(**torch.load(path, weights_only=True, mmap=True))

    def latents(self, vae: AutoencoderKL, drawings: Drawings) -> Tensor:
        """Posterior means of the training pictures, float32 [n, c, h, w], unscaled."""
        path = self.folder / "latents.pt"
        if not path.exists():
            save_atomically(encode_latents(vae, drawings.images), path)
        return torch.load(path, weights_only=True)  # type: ignore[no-any-return]

    def tokenizer(self, drawings: Drawings) -> CLIPTokenizer:
        """The vocabulary."""
        folder = self.folder / "tokenizer"
        if not folder.exists():
            texts = (text for texts in drawings.captions for text in texts)
            train_tokenizer(texts, folder, size=self.recipe.vocabulary, max_length=TOKENS)
        return CLIPTokenizer.from_pretrained(folder)  # type: ignore[no-any-return]

    def run(self, stages: Collection[str] = STAGES) -> None:
        """Run the wanted stages in order; each reads what the earlier ones have left in the folder."""
        recipe = self.recipe
        drawings = self.drawings()
        tokenizer = self.tokenizer(drawings)
        if "clip" in stages:
            clip = self.stage(
                "clip", lambda path: train_clip(recipe, drawings, tokenizer, path), CLIPModel.from_pretrained
            )
        if "vae" in stages:
            vae = self.stage("vae", lambda path: train_vae(recipe, drawings, path), AutoencoderKL.from_pretrained)
            latents = self.latents(vae, drawings)
        if "classifier" in stages:
            self.stage(
                "classifier",
                lambda path: train_classifier(recipe, drawings, decode_latents(vae, latents), path),
                CanvasClassifier.from_pretrained,
            )
        if "unet" in stages:
            self.stage(
                "unet",
                lambda path: train_unet(
                    recipe, scale_latents(vae, latents), drawings, tokenizer, clip.text_model, path
                ),
                UNet2DConditionModel.from_pretrained,
            )

    def ship(self, folder: Path) -> None:
        """Write the finished stages to ``folder`` as float16: a diffusers pipeline, its CLIP and its classifier."""
        tokenizer = CLIPTokenizer.from_pretrained(self.folder / "tokenizer")
        clip = CLIPModel.from_pretrained(self.folder / "clip").half()
        StableDiffusionPipeline(
            vae=AutoencoderKL.from_pretrained(self.folder / "vae").half(),
            text_encoder=clip.text_model,
            tokenizer=tokenizer,
            unet=UNet2DConditionModel.from_pretrained(self.folder / "unet").half(),
            scheduler=make_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
        clip.save_pretrained(folder / "clip")
        pixels = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        images = CLIPImageProcessor(
            size=pixels, crop_size=pixels, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
        )
        CLIPProcessor(images, tokenizer).save_pretrained(folder / "clip")
        CanvasClassifier.from_pretrained(self.folder / "classifier").half().save_pretrained(folder / "classifier")
        self.describe(folder, "text_encoder", "clip")


def main() -> None:
    """Make the canvas from nothing."""
    parser = argparse.ArgumentParser(description="Draw, train and ship the canvas.")
    parser.add_argument("--quick", action="store_true", help="a tiny one in seconds that only proves the path")
    parser.add_argument(
        "--build", type=Path, default=Path("build/canvas"), help="where stages and checkpoints are kept"
    )
    parser.add_argument("--ship", type=Path, default=None, help="where the finished folder goes")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="train these only; ship nothing")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    keep_freed_memory()
    build = Build(QUICK if arguments.quick else Recipe(), arguments.build)
    build.run(arguments.stages)
    if arguments.ship is not None:
        build.ship(arguments.ship)


if __name__ == "__main__":
    main()
