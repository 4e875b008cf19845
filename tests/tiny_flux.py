"""A tiny FLUX.1 with random weights: CLIP for the pooled embedding, a T5, joint and single blocks."""

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, CLIPTokenizer

from diffusion.canvas.tiny import tiny_clip_config
from tests.tiny_sd3 import JOINT, make_t5, make_vae

POOLED = 32


def make_tiny_flux(tokenizer_folder: Path, *, guided: bool) -> FluxPipeline:
    """Latents of 4 channels in squares of 2, two pixels each; with embedded guidance, or distilled to none."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    clip = CLIPTextModel(tiny_clip_config(tokenizer, POOLED))
    t5, t5_tokenizer = make_t5()
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=JOINT,
        pooled_projection_dim=POOLED,
        guidance_embeds=guided,
        axes_dims_rope=(4, 6, 6),
    )
    vae = make_vae(scaling_factor=0.4, shift_factor=0.12)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=guided),
        vae=vae,
        text_encoder=clip,
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=transformer,
    )
