"""Scopes name what the papers train; substitution is differentiable and leaves no trace."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

from diffusion.denoisers.flux import FluxDenoiser
from diffusion.denoisers.sd3 import SD3Denoiser
from diffusion.denoisers.unet import UNetDenoiser
from diffusion.parameters import named_parameters, substituted
from erasure.parameters import UNET_SCOPES, scope_parameters


@pytest.fixture(scope="module")
def sd14():
    """The U-Net of Stable Diffusion 1.4 without memory for its weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            cross_attention_dim=768,
            attention_head_dim=8,
        )
    return SimpleNamespace(denoiser=UNetDenoiser(unet, 8), network=unet, name="sd14")


def size(parameters):
    return sum(parameter.numel() for parameter in parameters.values())


@pytest.mark.parametrize(
    ("scope", "millions", "tensors"),
    [
        ("xattn", 43.96, 80),
        ("xattn_kv", 19.17, 32),
        ("ffn2", 49.56, 16),
        ("ffn", 148.8, 64),
        ("transformers", 267.0, 192),
        ("full", 859.5, 686),
    ],
)
def test_scopes_have_the_published_sizes_on_stable_diffusion(sd14, scope, millions, tensors):
    parameters = scope_parameters(sd14, scope)

    assert len(parameters) == tensors
    assert size(parameters) / 1e6 == pytest.approx(millions, rel=1e-3)


def test_scopes_partition_as_their_names_say(sd14):
    names = {scope: set(scope_parameters(sd14, scope)) for scope in sd14.denoiser.groups}

    assert names["xattn_ffn"] == names["xattn"] | names["ffn"]
    assert names["attn"] == names["xattn"] | names["selfattn"]
    assert names["xattn_kv"] < names["xattn"]
    left_out = names["full"] - names["noxattn"]
    assert {name.split(".")[0] for name in left_out - names["xattn"]} == {"time_embedding", "conv_norm_out", "conv_out"}
    assert names["xattn"] <= left_out
    assert "time_embedding.linear_1.weight" in names["esd_u"]
    assert not any("norm" in name and "norm_out" not in name for name in names["esd_u"])
    assert not names["esd_u"] & names["xattn"]
    assert all(name.endswith(".weight") for name in names["linear_conv"])
    assert not any(".norm" in name for name in names["linear_conv"])


def test_text_encoder_scope_is_prefixed_and_has_no_embedding_tables(tiny_model):
    names = list(scope_parameters(tiny_model, "text_encoder"))

    assert names
    assert all(name.startswith("text_encoder.") and "embedding" not in name for name in names)
    assert set(names) <= set(named_parameters(tiny_model))


def test_token_embedding_scope_is_the_table_of_tokens(tiny_model):
    [(name, table)] = scope_parameters(tiny_model, "token_embedding").items()

    assert table is tiny_model.vocabulary
    assert named_parameters(tiny_model)[name] is table


def test_text_encoder_parameters_are_substituted_too(tiny_model):
    [(name, table)] = scope_parameters(tiny_model, "token_embedding").items()
    before = tiny_model.encode(["a church"])
    scale = torch.tensor(2.0, requires_grad=True)

    with substituted(tiny_model, {name: scale * table}):
        doubled = tiny_model.encode(["a church"])
    doubled.square().sum().backward()

    assert not torch.equal(doubled, before)
    assert scale.grad is not None and scale.grad != 0
    assert torch.equal(tiny_model.encode(["a church"]), before)
    assert tiny_model.vocabulary is table


def test_unknown_scope_is_refused_by_name(tiny_model):
    with pytest.raises(ValueError, match="scope is 'cross'; it must be one of xattn, xattn_kv"):
        scope_parameters(tiny_model, "cross")


@pytest.mark.parametrize("scope", ["attn_kv", "ffn_text", "modulation", "text_projection"])
def test_scopes_of_transformers_are_refused_by_name(tiny_model, scope):
    assert scope in UNET_SCOPES
    with pytest.raises(ValueError, match=f"scope is '{scope}', which the U-Net of 'tiny' has not; choose one of xattn"):
        scope_parameters(tiny_model, scope)


def test_scope_without_parameters_is_refused():
    network = torch.nn.Conv2d(1, 1, 1)
    model = SimpleNamespace(denoiser=UNetDenoiser(network, 8), network=network, name="plain")

    with pytest.raises(ValueError, match="scope 'xattn' selects no parameter of 'plain'"):
        scope_parameters(model, "xattn")


def test_every_scope_names_parameters_in_module_order(tiny_model):
    order = list(named_parameters(tiny_model))

    for scope in (*tiny_model.denoiser.groups, "text_encoder", "token_embedding"):
        places = [order.index(name) for name in scope_parameters(tiny_model, scope)]
        assert places == sorted(places)


def test_substitution_is_differentiable_nests_and_restores(tiny_model):
    latents, text = tiny_model.initial_latents([0]), tiny_model.encode(["a church"])
    weights = scope_parameters(tiny_model, "xattn_kv")
    before = tiny_model.predict(latents, 500, text)
    scale = torch.tensor(0.5, requires_grad=True)

    with substituted(tiny_model, {name: scale * weight for name, weight in weights.items()}):
        halved = tiny_model.predict(latents, 500, text)
        with substituted(tiny_model, weights):
            assert torch.equal(tiny_model.predict(latents, 500, text), before)
        assert torch.equal(tiny_model.predict(latents, 500, text), halved)
    halved.square().sum().backward()

    assert not torch.equal(halved, before)
    assert scale.grad is not None and scale.grad != 0
    assert torch.equal(tiny_model.predict(latents, 500, text), before)
    assert all(scope_parameters(tiny_model, "xattn_kv")[name] is weight for name, weight in weights.items())


def on_paper(network: type, denoiser: type, **sizes) -> SimpleNamespace:
    """A model whose network has no memory for its weights."""
    with torch.device("meta"):
        made = network(**sizes)
    return SimpleNamespace(denoiser=denoiser(made), network=made, name="paper")


@pytest.fixture(scope="module")
def transformers() -> dict[str, SimpleNamespace]:
    """The transformers of Stable Diffusion 3 medium, 3.5 medium and FLUX.1-dev."""
    sd3 = {
        **{"sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 24, "attention_head_dim": 64},
        **{"num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536},
        **{"pooled_projection_dim": 2048, "out_channels": 16},
    }
    dual = {"pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))}
    return {
        "sd3_medium": on_paper(SD3Transformer2DModel, SD3Denoiser, **sd3, pos_embed_max_size=192),
        "sd35_medium": on_paper(SD3Transformer2DModel, SD3Denoiser, **sd3, **dual),
        "flux_dev": on_paper(FluxTransformer2DModel, FluxDenoiser, guidance_embeds=True),
    }


@pytest.mark.parametrize(
    ("name", "scope", "millions"),
    [
        *(("sd3_medium", scope, size) for scope, size in (("full", 2028), ("xattn_kv", 113), ("xattn", 224))),
        *(("sd3_medium", scope, size) for scope, size in (("attn", 451), ("ffn", 453), ("ffn_text", 434))),
        *(("sd3_medium", scope, size) for scope, size in (("modulation", 670), ("text_projection", 11.8))),
        ("sd35_medium", "full", 2243),
        ("sd35_medium", "xattn", 224),
        *(("flux_dev", scope, size) for scope, size in (("full", 11901), ("xattn_kv", 359), ("xattn", 717))),
        # ESD's authors' esd-x and esd-x-strict.
        *(("flux_dev", scope, size) for scope, size in (("attn", 2511), ("attn_kv", 1076), ("ffn_text", 1435))),
    ],
)
def test_scopes_have_the_known_sizes_on_transformers(transformers, name, scope, millions):
    assert size(scope_parameters(transformers[name], scope)) / 1e6 == pytest.approx(millions, rel=5e-3)
