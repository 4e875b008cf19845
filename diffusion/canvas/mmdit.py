"""The canvas's transformer: Stable Diffusion 3's architecture, trained by flow matching on latents of the canvas."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from diffusion.canvas.pictures import Drawings
from diffusion.canvas.plan import SEEDS_PER_TRAINING
from diffusion.progress import track
from diffusion.streams import derived_seed, stream
from diffusion.training import cosine_warmup, fit


@dataclass(frozen=True)
class TransformerRecipe:
    """Numbers of the transformer's training.

    Attributes:
        seed: Of weights and draws.
        width: Of its rows, 32 for each head.
        layers: Joint blocks.
        patch: Edge of the squares of latents that are one position.
        positions: Edge of the table of positions, in patches.
        steps: Optimiser steps.
        batch: Pictures per step.
        learning_rate: AdamW's, at its highest.
        caption_dropout: How often a picture goes with the empty prompt.
    """

    seed: int = 0
    width: int = 128
    layers: int = 4
    patch: int = 1
    positions: int = 16
    steps: int = 4500
    batch: int = 64
    learning_rate: float = 1e-3
    caption_dropout: float = 0.1


def transformer_seed(recipe: TransformerRecipe, training_seed: int) -> int:
    """Of the transformer's first weights and of its draws; training seed 0 is the recipe's own."""
    return recipe.seed + SEEDS_PER_TRAINING * training_seed


@dataclass(frozen=True)
class Texts:
    """Prompts as the transformer sees them.

    Attributes:
        rows: float16 [n, tokens, width], the penultimate hidden states of both encoders side by side.
        pooled: float16 [n, width], their projected embeddings side by side.
    """

    rows: Tensor
    pooled: Tensor


def text_half(clip: CLIPModel) -> CLIPTextModelWithProjection:
    """A CLIP's text encoder with its projection, a copy."""
    # A text encoder by itself has the width of its projection among its own settings.
    settings = {**clip.config.text_config.to_dict(), "projection_dim": clip.config.projection_dim}
    encoder = CLIPTextModelWithProjection(CLIPTextConfig(**settings))
    encoder.text_model.load_state_dict(clip.text_model.state_dict())
    encoder.text_projection.load_state_dict(clip.text_projection.state_dict())
    return encoder.eval()


@torch.no_grad()
def read_captions(
    tokenizer: CLIPTokenizer, encoders: Sequence[CLIPTextModelWithProjection], texts: list[str], *, batch: int = 500
) -> Texts:
    """What the transformer sees of ``texts``."""
    chunks = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.split(batch)
    rows, pooled = [], []
    for ids in track(chunks, "captions", len(chunks)):
        outputs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
        rows.append(torch.cat([output.hidden_states[-2] for output in outputs], dim=-1).half())
        pooled.append(torch.cat([output.text_embeds for output in outputs], dim=-1).half())
    return Texts(torch.cat(rows), torch.cat(pooled))


def make_transformer(recipe: TransformerRecipe, latent_shape: Sequence[int], texts: Texts) -> SD3Transformer2DModel:
    """A fresh transformer for latents of (channels, edge, edge), whose blocks do nothing at first (AdaLN-Zero)."""
    channels, edge, _ = latent_shape
    transformer = SD3Transformer2DModel(
        sample_size=edge,
        patch_size=recipe.patch,
        in_channels=channels,
        out_channels=channels,
        num_layers=recipe.layers,
        attention_head_dim=32,
        num_attention_heads=recipe.width // 32,
        joint_attention_dim=texts.rows.shape[-1],
        caption_projection_dim=recipe.width,
        pooled_projection_dim=texts.pooled.shape[-1],
        pos_embed_max_size=recipe.positions,
        qk_norm="rms_norm",
    )
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            # diffusers starts them at random; from zero every block begins as the identity.
            if ".norm1" in name or name.startswith(("norm_out.linear.", "proj_out.")):
                parameter.zero_()
    return transformer


def train_transformer(
    recipe: TransformerRecipe,
    latents: Tensor,
    drawings: Drawings,
    tokenizer: CLIPTokenizer,
    encoders: Sequence[CLIPTextModelWithProjection],
    checkpoint: Path | None,
    *,
    training_seed: int = 0,
) -> SD3Transformer2DModel:
    """Train the transformer on scaled and shifted ``latents``, float [n, c, h, w].

    || v(x_s, s, text) - (noise - x_0) ||^2 (mean), x_s = (1 - s) x_0 + s noise, s the logistic function of a unit
    Gaussian number (Esser et al., ICML 2024); the empty prompt's rows and pooled embedding are dropped in together.
    """
    seed = transformer_seed(recipe, training_seed)
    torch.manual_seed(derived_seed(seed, "canvas_mmdit/weights"))
    captions = len(drawings.captions[0])
    texts = read_captions(tokenizer, encoders, [text for texts in drawings.captions for text in texts])
    empty = read_captions(tokenizer, encoders, [""])
    transformer = make_transformer(recipe, latents.shape[1:], texts)
    parameters = list(transformer.parameters())

    def loss(step: int) -> Tensor:
        generator = stream(seed, "canvas_mmdit/training", step)
        rows = torch.randint(len(latents), (recipe.batch,), generator=generator)
        which = torch.randint(captions, (recipe.batch,), generator=generator)
        dropped = torch.rand(recipe.batch, generator=generator) < recipe.caption_dropout
        share = torch.randn(recipe.batch, generator=generator).sigmoid()
        noise = torch.randn(latents[rows].shape, generator=generator)
        places = rows * captions + which
        text = torch.where(dropped[:, None, None], empty.rows, texts.rows[places]).float()
        pooled = torch.where(dropped[:, None], empty.pooled, texts.pooled[places]).float()
        s = share[:, None, None, None]
        predicted: Tensor = transformer(
            hidden_states=(1 - s) * latents[rows] + s * noise,
            timestep=1000 * share,
            encoder_hidden_states=text,
            pooled_projections=pooled,
        ).sample
        return functional.mse_loss(predicted, noise - latents[rows])

    fit(
        parameters,
        loss,
        steps=recipe.steps,
        optimizer=torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.01),
        learning_rate_factor=cosine_warmup(recipe.steps, warmup=200),
        ema_decay=0.999,
        clip_norm=1.0,
        label="transformer",
        checkpoint=checkpoint,
        checkpoint_every=100,
    )
    return transformer.eval()


def assemble(
    vae: AutoencoderKL,
    transformer: SD3Transformer2DModel,
    tokenizer: CLIPTokenizer,
    encoders: Sequence[CLIPTextModelWithProjection],
) -> StableDiffusion3Pipeline:
    """The pipeline of the trained parts, without a T5; its few image tokens want no shift of the times."""
    first, second = encoders
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
