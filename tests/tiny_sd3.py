"""A tiny Stable Diffusion 3 with random weights: two CLIP encoders, a T5 or none, and a transformer."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from diffusion.canvas.tiny import tiny_clip_config, tiny_vae

TOKENS, WIDTHS, JOINT, T5_TOKENS = 24, (32, 24), 64, 6
"""Positions and widths of the CLIP encoders, width of a row, and the rows of T5 in tests."""


def make_tiny_sd3(
    tokenizer_folder: Path,
    *,
    t5: bool = False,
    dual: bool = False,
    shift: float = 3.0,
    qk_norm: str | None = "rms_norm",
) -> StableDiffusion3Pipeline:
    """8x8 latents of 4 channels in patches of 2, 16x16 pictures.

    Args:
        tokenizer_folder: CLIP's tokenizer.
        t5: With a T5.
        dual: With a second image attention in the first block, as Stable Diffusion 3.5 medium has.
        shift: Of the scheduler.
        qk_norm: Of the transformer's queries and keys.
    """
    torch.manual_seed(0)
    first = CLIPTokenizer.from_pretrained(tokenizer_folder)
    second = CLIPTokenizer.from_pretrained(tokenizer_folder, pad_token=first.convert_ids_to_tokens(0))
    encoders = [
        CLIPTextModelWithProjection(tiny_clip_config(tokenizer, width, projection_dim=width, hidden_act=activation))
        for width, activation, tokenizer in zip(WIDTHS, ("quick_gelu", "gelu"), (first, second), strict=True)
    ]
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=JOINT,
        caption_projection_dim=32,
        pooled_projection_dim=sum(WIDTHS),
        pos_embed_max_size=8,
        qk_norm=qk_norm,
        dual_attention_layers=(0,) if dual else (),
    )
    vae = make_vae(scaling_factor=1.5, shift_factor=0.06)
    third, third_tokenizer = make_t5() if t5 else (None, None)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=first,
        text_encoder_2=encoders[1],
        tokenizer_2=second,
        text_encoder_3=third,
        tokenizer_3=third_tokenizer,
    )


def make_vae(**own: Any) -> AutoencoderKL:
    """The tiny autoencoder without the layers that those of flow models have not; ``own`` are other settings."""
    return tiny_vae(use_quant_conv=False, use_post_quant_conv=False, **own)


def make_t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    """A T5 that knows some words and all letters, and its tokenizer."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", "▁a", "▁church", "▁red", "▁fish", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = T5Tokenizer(
        vocab=[(piece, -float(place)) for place, piece in enumerate(pieces)], extra_ids=0, model_max_length=T5_TOKENS
    )
    config = T5Config(
        vocab_size=len(pieces),
        d_model=JOINT,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config), tokenizer
