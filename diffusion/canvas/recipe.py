"""How the canvas was made: from nothing to a Stable Diffusion folder, with fixed seeds, on a CPU.

Stages, each resumable and each kept in the build folder:

1. ``pictures``    scenes drawn at random, with several captions each
2. ``tokenizer``   a byte-pair vocabulary in CLIP's format, trained on those captions
3. ``clip``        a small CLIP, trained contrastively; its text half conditions the U-Net
4. ``vae``         an ``AutoencoderKL``
5. ``classifier``  the judge's network, on pictures and on their reconstructions
6. ``unet``        epsilon prediction on the VAE's latents, with dropped captions for guidance

Run ``python -m diffusion.canvas.recipe`` (``make canvas``); ``--quick`` makes a tiny one that only proves the path.
"""

import argparse
import json
import logging
import os
import time
from collections.abc import Callable, Collection
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTextModel, CLIPTokenizer

from diffusion.allocator import keep_freed_memory
from diffusion.canvas.captions import caption
from diffusion.canvas.classifier import HEADS, CanvasClassifier
from diffusion.canvas.drawing import draw
from diffusion.canvas.vocabulary import train_tokenizer
from diffusion.canvas.world import IMAGE_SIZE, STYLES, SUBJECTS, Scene, random_scene
from diffusion.training import cosine_warmup, fit, save_atomically

log = logging.getLogger(__name__)

TOKENS = 32
"""Positions of the text encoder."""

STAGES = ("clip", "vae", "classifier", "unet")
"""What can be trained by itself, in order."""


class Stage(Protocol):
    """A network that writes itself to a folder."""

    def save_pretrained(self, save_directory: Path) -> object:
        """Write configuration and weights."""


Saved = TypeVar("Saved", bound=Stage)


@dataclass(frozen=True)
class Recipe:
    """Every number of the training; the one that made a folder of weights lies beside them as ``recipe.json``."""

    seed: int = 0
    pictures: int = 30_000
    captions_per_picture: int = 4
    vocabulary: int = 1000
    text_width: int = 128
    text_layers: int = 4
    clip_steps: int = 1000
    clip_batch: int = 128
    latent_channels: int = 8
    vae_channels: tuple[int, ...] = (24, 48, 64)
    vae_steps: int = 2000
    vae_batch: int = 32
    classifier_width: int = 32
    classifier_steps: int = 800
    classifier_batch: int = 64
    unet_channels: tuple[int, ...] = (64, 128)
    unet_layers: int = 1
    unet_heads: int = 4
    unet_steps: int = 3600
    unet_batch: int = 64
    caption_dropout: float = 0.1


QUICK = Recipe(
    pictures=96,
    vocabulary=600,
    text_width=32,
    text_layers=1,
    clip_steps=3,
    clip_batch=8,
    vae_channels=(16, 16, 16),
    vae_steps=3,
    vae_batch=8,
    classifier_width=8,
    classifier_steps=3,
    classifier_batch=8,
    unet_channels=(16, 32),
    unet_heads=2,
    unet_steps=3,
    unet_batch=8,
)
"""The whole path in seconds; its pictures are noise."""


@dataclass(frozen=True)
class Drawings:
    """The training set: ``images`` uint8 [n, 3, H, W], ``captions`` n lists, ``labels`` int64 [n] for each head."""

    images: Tensor
    captions: list[list[str]]
    labels: dict[str, Tensor]


def labels_of(scene: Scene) -> dict[str, int]:
    """The index of the scene's label in each head of the classifier."""
    return {
        "style": STYLES.index(scene.style),
        "subject": SUBJECTS.index(scene.subject),
        "burning": int(scene.burning),
    }


def step_generator(seed: int, step: int) -> torch.Generator:
    """The draws of a training step, as the shipped weights were made: 32 bits of a sum of both arguments."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def _draw_one(seed: tuple[int, int, int]) -> tuple[npt.NDArray[np.uint8], list[str], dict[str, int]]:
    """Draw the picture with index ``seed[1]`` of the set ``seed[0]`` and write ``seed[2]`` captions for it."""
    *where, captions = seed
    generator = np.random.default_rng(where)
    scene = random_scene(generator)
    image = draw(scene, generator)
    return image, [caption(scene, generator) for _ in range(captions)], labels_of(scene)


def draw_pictures(count: int, *, seed: int, captions: int) -> Drawings:
    """Draw ``count`` scenes; picture ``i`` depends on ``(seed, i)`` alone."""
    tasks = [(seed, index, captions) for index in range(count)]
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        drawn = list(pool.map(_draw_one, tasks, chunksize=64))
    images = torch.from_numpy(np.stack([image for image, _, _ in drawn])).permute(0, 3, 1, 2).contiguous()
    labels = {head: torch.tensor([each[head] for _, _, each in drawn]) for head in HEADS}
    return Drawings(images, [texts for _, texts, _ in drawn], labels)


def to_float(images: Tensor) -> Tensor:
    """Map uint8 pixels to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def train_clip(recipe: Recipe, drawings: Drawings, tokenizer: CLIPTokenizer, checkpoint: Path) -> CLIPModel:
    """Train the text and the vision encoder on (picture, caption) pairs with CLIP's symmetric contrastive loss."""
    torch.manual_seed(recipe.seed)
    tower = {
        "hidden_size": recipe.text_width,
        "intermediate_size": 4 * recipe.text_width,
        "num_hidden_layers": recipe.text_layers,
        "num_attention_heads": recipe.text_width // 32,
        "projection_dim": recipe.text_width,
    }
    specials = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(
        text_config={**tower, **specials, "vocab_size": len(tokenizer), "max_position_embeddings": TOKENS},
        vision_config={**tower, "image_size": IMAGE_SIZE, "patch_size": 8},
        projection_dim=recipe.text_width,
    )
    model = CLIPModel(config)
    ids = torch.stack([encode_captions(tokenizer, texts) for texts in drawings.captions])
    parameters = list(model.parameters())

    def loss(step: int) -> Tensor:
        generator = step_generator(recipe.seed, step)
        rows = torch.randint(len(drawings.images), (recipe.clip_batch,), generator=generator)
        which = torch.randint(recipe.captions_per_picture, (recipe.clip_batch,), generator=generator)
        output = model(input_ids=ids[rows, which], pixel_values=to_float(drawings.images[rows]), return_loss=True)
        return output.loss  # type: ignore[no-any-return]

    fit(
        parameters,
        loss,
        steps=recipe.clip_steps,
        optimizer=torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05),
        learning_rate_factor=cosine_warmup(recipe.clip_steps, warmup=100),
        clip_norm=1.0,
        label="CLIP",
        checkpoint=checkpoint,
    )
    return model.eval()


def encode_captions(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids, int64 [n, TOKENS], padded and cut to the text encoder's length."""
    padded = tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    return padded.input_ids  # type: ignore[no-any-return]


@torch.no_grad()
def embed_captions(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, texts: list[str]) -> Tensor:
    """What the U-Net sees of ``texts``: float16 [n, TOKENS, width]."""
    batches = encode_captions(tokenizer, texts).split(500)
    return torch.cat([text_encoder(ids).last_hidden_state.half() for ids in batches])


def train_vae(recipe: Recipe, drawings: Drawings, checkpoint: Path) -> AutoencoderKL:
    """Train the autoencoder: L1 + L2 + differences of neighbouring pixels (texture), and a slight KL term."""
    torch.manual_seed(recipe.seed + 1)
    blocks = len(recipe.vae_channels)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=recipe.vae_channels,
        layers_per_block=1,
        latent_channels=recipe.latent_channels,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
    ).to(memory_format=torch.channels_last)
    parameters = list(vae.parameters())

    def loss(step: int) -> Tensor:
        generator = step_generator(recipe.seed + 1, step)
        rows = torch.randint(len(drawings.images), (recipe.vae_batch,), generator=generator)
        pixels = to_float(drawings.images[rows]).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(pixels).latent_dist
        divergence: Tensor = posterior.kl().mean()
        error: Tensor = vae.decode(posterior.sample(generator=generator)).sample - pixels
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        return error.abs().mean() + error.square().mean() + 0.5 * edges + 1e-6 * divergence

    fit(
        parameters,
        loss,
        steps=recipe.vae_steps,
        optimizer=torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0),
        learning_rate_factor=cosine_warmup(recipe.vae_steps, warmup=100),
        ema_decay=0.995,
        clip_norm=1.0,
        label="VAE",
        checkpoint=checkpoint,
    )
    with torch.no_grad():
        sample = encode_latents(vae, drawings.images[:2000])
    vae.register_to_config(scaling_factor=float(1 / sample.std()))
    return vae.eval()


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, images: Tensor, *, batch: int = 250) -> Tensor:
    """Posterior means, float32 [n, c, h, w], unscaled."""
    return torch.cat([vae.encode(to_float(chunk)).latent_dist.mean for chunk in images.split(batch)])


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor, *, batch: int = 250) -> Tensor:
    """Pictures, uint8 [n, 3, H, W], of unscaled latents."""
    decoded = torch.cat([vae.decode(chunk).sample for chunk in latents.split(batch)])
    return ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def train_classifier(recipe: Recipe, drawings: Drawings, reconstructions: Tensor, checkpoint: Path) -> CanvasClassifier:
    """Train the judge's network, half on drawn pictures, half on reconstructions, shifted and brightened a little."""
    torch.manual_seed(recipe.seed + 2)
    network = CanvasClassifier(width=recipe.classifier_width).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parameters = list(network.parameters())
    sources = torch.stack([drawings.images, reconstructions])

    def loss(step: int) -> Tensor:
        generator = step_generator(recipe.seed + 2, step)
        rows = torch.randint(len(drawings.images), (recipe.classifier_batch,), generator=generator)
        which = torch.randint(2, (recipe.classifier_batch,), generator=generator)
        images = sources[which, rows].float()
        gain = 0.9 + 0.2 * torch.rand((len(images), 1, 1, 1), generator=generator)
        grain = 6 * torch.randn(images.shape, generator=generator)
        logits = network((images * gain + grain).clamp(0, 255))
        losses = [
            functional.cross_entropy(logits[head], drawings.labels[head][rows], label_smoothing=0.05) for head in HEADS
        ]
        return torch.stack(losses).sum()

    network.train()
    fit(
        # Running statistics of the batch normalisation are state too: they are saved, restored and averaged.
        [*parameters, *(buffer for buffer in network.buffers() if buffer.is_floating_point())],
        loss,
        steps=recipe.classifier_steps,
        optimizer=torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.05),
        learning_rate_factor=cosine_warmup(recipe.classifier_steps, warmup=100),
        label="judge",
        checkpoint=checkpoint,
    )
    return network.eval()


def train_unet(
    recipe: Recipe,
    latents: Tensor,
    drawings: Drawings,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    checkpoint: Path,
) -> UNet2DConditionModel:
    """Train the U-Net on scaled ``latents`` [n, c, h, w] with losses weighted by min(SNR, 5) / SNR (2303.09556)."""
    torch.manual_seed(recipe.seed + 3)
    levels = len(recipe.unet_channels)
    unet = UNet2DConditionModel(
        sample_size=latents.shape[-1],
        in_channels=latents.shape[1],
        out_channels=latents.shape[1],
        layers_per_block=recipe.unet_layers,
        block_out_channels=recipe.unet_channels,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        cross_attention_dim=recipe.text_width,
        attention_head_dim=recipe.unet_heads,
        norm_num_groups=16,
    ).to(memory_format=torch.channels_last)
    parameters = list(unet.parameters())
    texts = embed_captions(tokenizer, text_encoder, [text for texts in drawings.captions for text in texts])
    empty = embed_captions(tokenizer, text_encoder, [""])
    alphas: Tensor = make_scheduler().alphas_cumprod
    signal_to_noise = alphas / (1 - alphas)

    def loss(step: int) -> Tensor:
        generator = step_generator(recipe.seed + 3, step)
        rows = torch.randint(len(latents), (recipe.unet_batch,), generator=generator)
        which = torch.randint(recipe.captions_per_picture, (recipe.unet_batch,), generator=generator)
        dropped = torch.rand(recipe.unet_batch, generator=generator) < recipe.caption_dropout
        timesteps = torch.randint(len(alphas), (recipe.unet_batch,), generator=generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        captions = texts[rows * recipe.captions_per_picture + which]
        text = torch.where(dropped[:, None, None], empty, captions).float()
        alpha = alphas[timesteps][:, None, None, None]
        noisy = alpha.sqrt() * latents[rows] + (1 - alpha).sqrt() * noise
        predicted: Tensor = unet(noisy.contiguous(memory_format=torch.channels_last), timesteps, text).sample
        weight = signal_to_noise[timesteps].clamp(max=5) / signal_to_noise[timesteps]
        return (weight * (predicted - noise).square().mean(dim=(1, 2, 3))).mean()

    fit(
        parameters,
        loss,
        steps=recipe.unet_steps,
        optimizer=torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01),
        learning_rate_factor=cosine_warmup(recipe.unet_steps, warmup=200),
        ema_decay=0.999,
        clip_norm=1.0,
        label="U-Net",
        checkpoint=checkpoint,
        checkpoint_every=250,
    )
    return unet.eval()


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


class Build:
    """Runs the stages of a recipe in a folder; a finished stage is read back instead of run again.

    Raises:
        ValueError: The folder was begun with another recipe.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe = recipe
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        recorded = folder / "recipe.json"
        described = json.dumps(asdict(recipe), indent=2) + "\n"
        if recorded.exists() and recorded.read_text() != described:
            raise ValueError(f"{folder} was begun with another recipe; name another folder or remove it.")
        recorded.write_text(described)

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
                    recipe, latents * vae.config.scaling_factor, drawings, tokenizer, clip.text_model, path
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
        for config in (folder / "text_encoder" / "config.json", folder / "clip" / "config.json"):
            # transformers loads in the precision named here; computing in float16 is not what a CPU should do.
            config.write_text(config.read_text().replace("float16", "float32"))
        (folder / "recipe.json").write_text((self.folder / "recipe.json").read_text())


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
