"""The numbers of the canvas's training: sizes, steps, seeds and the noise schedule."""

from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler

TOKENS = 32
"""Positions of the text encoder."""

_STEPS_PER_SEED = 1_000_003
_UNET_SEED = 3

SEEDS_PER_TRAINING = 100
"""How far the seeds of two trainings of a network are apart."""


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


def step_generator(seed: int, step: int) -> torch.Generator:
    """The numbers of one step of the stage with this ``seed``.

    PyTorch's generator looks at 32 bits of its seed, so seeds of different stages and steps must differ below 2^32.

    Raises:
        ValueError: They would not.
    """
    number = seed * _STEPS_PER_SEED + step
    if not 0 <= number < 2**32:
        raise ValueError(
            f"seed {seed} leaves the 32 bits of PyTorch's generator, allowed: 0 to {2**32 // _STEPS_PER_SEED - 1}"
        )
    return torch.Generator().manual_seed(number)


def unet_seed(recipe: Recipe, training_seed: int) -> int:
    """The U-Net stage's seed: of its initial weights, and of what every step draws.

    Training seed 0 is the one of the recipe itself; the others give the same pictures to other initial weights, in
    another order, with other noise.
    """
    return recipe.seed + _UNET_SEED + SEEDS_PER_TRAINING * training_seed


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
