"""Stable Diffusion 3 and FLUX at their full size: what scopes select, and one evaluation of a transformer."""

from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import nn

from diffusion.denoisers.flux import FluxDenoiser
from diffusion.denoisers.protocol import Denoiser
from diffusion.denoisers.sd3 import SD3Denoiser

SD3: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
}
MEDIUM = {**SD3, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
MEDIUM35 = {**MEDIUM, "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))}
LARGE35 = {
    **SD3,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
DEV = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}


def empty(network: type[nn.Module], config: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return network(**config)


def millions(denoiser: Denoiser, scope: str) -> float:
    """Parameters of a scope, biases included."""
    selects = denoiser.groups[scope]
    return (
        sum(
            parameter.numel()
            for name, parameter in denoiser.network.named_parameters()
            if selects(name, denoiser.network.get_submodule(name.rpartition(".")[0]))
        )
        / 1e6
    )


@pytest.mark.parametrize(
    ("denoiser", "network", "config", "sizes"),
    [
        (
            SD3Denoiser,
            SD3Transformer2DModel,
            MEDIUM,
            {"full": 2028, "xattn_kv": 113, "xattn": 224, "attn": 451, "ffn": 453, "ffn_text": 434, "modulation": 670},
        ),
        # Its second image attention sees no text: the scopes of text are those of the model before it.
        (SD3Denoiser, SD3Transformer2DModel, MEDIUM35, {"full": 2243, "xattn_kv": 113, "xattn": 224}),
        (SD3Denoiser, SD3Transformer2DModel, LARGE35, {"full": 8057, "xattn_kv": 450, "xattn": 893, "attn": 1793}),
        # All attention is what ESD's authors train of FLUX as esd-x, and keys and values as esd-x-strict.
        (
            FluxDenoiser,
            FluxTransformer2DModel,
            DEV,
            {"full": 11901, "xattn_kv": 359, "xattn": 717, "attn": 2511, "attn_kv": 1076, "ffn_text": 1435},
        ),
    ],
    ids=["sd3_medium", "sd35_medium", "sd35_large", "flux_dev"],
)
def test_scopes_have_the_sizes_that_are_known(
    denoiser: Any, network: type[nn.Module], config: dict[str, Any], sizes: dict[str, float]
) -> None:
    model = denoiser(empty(network, config))
    assert {scope: round(millions(model, scope)) for scope in sizes} == sizes


def fill(network: nn.Module) -> None:
    """Small random numbers, the same million over and over: drawing two billion takes longer than an evaluation."""
    numbers = 0.02 * torch.randn(2**20, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for tensor in (*network.parameters(), *network.buffers()):
        for chunk in tensor.data.view(-1).split(len(numbers)):
            chunk.copy_(numbers[: len(chunk)])


@pytest.mark.slow
def test_a_transformer_of_two_billion_weights_predicts() -> None:
    network = empty(SD3Transformer2DModel, MEDIUM).to(torch.bfloat16).to_empty(device="cpu").eval()
    fill(network)
    denoiser = SD3Denoiser(network)
    generator = torch.Generator().manual_seed(0)
    latents, text, pooled = (
        torch.randn(shape, generator=generator).to(torch.bfloat16)
        for shape in ((1, 16, 16, 16), (1, 77 + 256, 4096), (1, 2048))
    )
    with torch.no_grad():
        predictions = [
            denoiser.evaluate(latents, torch.tensor([500.0]), rows, pooled, torch.ones(1)) for rows in (text, 0 * text)
        ]
    assert [prediction.shape for prediction in predictions] == [latents.shape] * 2
    assert all(bool(prediction.isfinite().all()) for prediction in predictions)
    assert float((predictions[0] - predictions[1]).abs().max()) > 0
    assert (denoiser.size, denoiser.largest, denoiser.tokens(16, 16)) == ((128, 128), 384, 64)
