"""A model of Stable Diffusion's shape with random weights, which draws nothing to look at within milliseconds.

New methods and the tests are tried on it: it says whether they do what their protocol wants, and nothing of how well.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusion.canvas.plan import make_scheduler
from diffusion.checked import checked
from diffusion.model import TextToImage
from diffusion.sources import CANVAS_FOLDER


def tiny_pipeline(tokenizer_folder: Path = CANVAS_FOLDER / "tokenizer", *, seed: int = 0) -> StableDiffusionPipeline:
    """8x8 latents of 4 channels, 16x16 pictures, text of width 32, cross-attention at both levels.

    Args:
        tokenizer_folder: Whose tokens and length of a text the model has; the canvas's by default.
        seed: Of the weights, which PyTorch's own stream is set to.
    """
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(seed)
    text_encoder = CLIPTextModel(tiny_clip_config(tokenizer))
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    vae = tiny_vae()
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_clip_config(tokenizer: CLIPTokenizer, width: int = 32, **own: Any) -> CLIPTextConfig:
    """Two layers of a CLIP text encoder for the tokens and the length of ``tokenizer``; ``own`` are other settings."""
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPTextConfig(**{**settings, **own})


def tiny_vae(**own: Any) -> AutoencoderKL:
    """An autoencoder with 8x8 latents of 4 channels for 16x16 pictures; ``own`` are other settings."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
        **own,
    )


@checked
class TinySource:
    """The tiny model as a choice of model.

    Attributes:
        source: Whose tokenizer it has.
        precision: ``fp32``, or ``fp64``, where a verdict does not hang on the order of a sum.
        name: What results call it.
    """

    source: Literal["canvas"] = "canvas"
    precision: Literal["fp32", "fp64"] = "fp32"
    name: str = "tiny"

    def load(self) -> TextToImage:
        """Make the model."""
        with torch.random.fork_rng(devices=[]):
            pipeline = tiny_pipeline()
        if self.precision == "fp64":
            for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
                part.double()
        return TextToImage(pipeline, name=self.name)
