"""What each kind of diffusers pipeline consists of: the one place that tells architectures apart."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

from diffusion.denoisers.flux import FluxDenoiser
from diffusion.denoisers.protocol import Denoiser
from diffusion.denoisers.sd3 import SD3Denoiser
from diffusion.denoisers.unet import UNetDenoiser
from diffusion.processes.flow import RectifiedFlow
from diffusion.processes.protocol import NoiseProcess
from diffusion.processes.variance import VarianceProcess
from diffusion.text.encoders import OneTextEncoder, TextEncoderPair, TextEncoders
from diffusion.text.with_t5 import T5, FluxTextEncoder, TripleTextEncoder

Pipeline: TypeAlias = StableDiffusionPipeline | StableDiffusionXLPipeline | StableDiffusion3Pipeline | FluxPipeline


@dataclass(frozen=True)
class Architecture:
    """The parts of a model that depend on its architecture.

    Attributes:
        denoiser: Its network.
        text_encoders: What reads prompts.
        process: (image tokens of a picture) -> its noise process.
        assemble: (parts by their diffusers names) -> a plain pipeline of them.
        vae_overflows: Its own VAE overflows in float16.
    """

    denoiser: Denoiser
    text_encoders: TextEncoders
    process: Callable[[int], NoiseProcess]
    assemble: Callable[..., Pipeline]
    vae_overflows: bool = False


def architecture_of(pipeline: Pipeline, name: str, *, t5_tokens: int, offload_to: torch.device | None) -> Architecture:
    """The parts of a loaded pipeline; used, not copied.

    Args:
        pipeline: Which may lack what nothing here uses.
        name: What errors call the model.
        t5_tokens: Rows of T5, where the architecture has one.
        offload_to: Where a T5 that waits elsewhere is taken to read.
    """
    if isinstance(pipeline, StableDiffusion3Pipeline):
        return _sd3(pipeline, name, t5_tokens, offload_to)
    if isinstance(pipeline, FluxPipeline):
        return _flux(pipeline, name, t5_tokens, offload_to)
    process = VarianceProcess(pipeline.scheduler.config, name)
    denoiser = UNetDenoiser(pipeline.unet, int(2 ** (len(pipeline.vae.config.block_out_channels) - 1)))
    if isinstance(pipeline, StableDiffusionXLPipeline):
        pair = TextEncoderPair(
            (pipeline.text_encoder, pipeline.text_encoder_2),
            (pipeline.tokenizer, pipeline.tokenizer_2),
            zeros_for_empty=bool(pipeline.config.force_zeros_for_empty_prompt),
        )
        return Architecture(denoiser, pair, lambda _: process, _sdxl_pipeline, vae_overflows=True)
    one = OneTextEncoder((pipeline.text_encoder,), (pipeline.tokenizer,))
    return Architecture(denoiser, one, lambda _: process, _sd_pipeline)


def _sd3(
    pipeline: StableDiffusion3Pipeline, name: str, t5_tokens: int, offload_to: torch.device | None
) -> Architecture:
    third = pipeline.text_encoder_3
    encoders = TripleTextEncoder(
        (pipeline.text_encoder, pipeline.text_encoder_2),
        (pipeline.tokenizer, pipeline.tokenizer_2),
        t5=None if third is None else _waiting(T5(third, pipeline.tokenizer_3, offload_to)),
        t5_tokens=t5_tokens,
        width=int(pipeline.transformer.config.joint_attention_dim),
    )
    config = pipeline.scheduler.config
    return Architecture(
        SD3Denoiser(pipeline.transformer),
        encoders,
        lambda tokens: RectifiedFlow(config, tokens, name),
        StableDiffusion3Pipeline,
    )


def _flux(pipeline: FluxPipeline, name: str, t5_tokens: int, offload_to: torch.device | None) -> Architecture:
    encoders = FluxTextEncoder(
        pipeline.text_encoder,
        pipeline.tokenizer,
        t5=_waiting(T5(pipeline.text_encoder_2, pipeline.tokenizer_2, offload_to)),
        t5_tokens=t5_tokens,
        width=int(pipeline.transformer.config.joint_attention_dim),
    )
    config = pipeline.scheduler.config
    return Architecture(
        FluxDenoiser(pipeline.transformer),
        encoders,
        lambda tokens: RectifiedFlow(config, tokens, name, spacing="even"),
        FluxPipeline,
    )


def _waiting(t5: T5) -> T5:
    """The same T5, on the CPU if it only visits the GPU."""
    if t5.visits is not None:
        t5.encoder.to("cpu")
    return t5


def _sd_pipeline(**parts: Any) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def _sdxl_pipeline(**parts: Any) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(**parts, add_watermarker=False)
