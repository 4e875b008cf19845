"""Published edits of Stable Diffusion 3 and FLUX: partial weights by diffusers' names, and low-rank files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from safetensors.torch import save_file
from torch import Tensor

from diffusion.model import TextToImage
from diffusion.parameters import named_parameters
from erasure.checkpoints import edit_of
from erasure.export import export
from tests.tiny_flux import make_tiny_flux
from tests.tiny_sd3 import T5_TOKENS, make_tiny_sd3

Weights = dict[str, Tensor]
Factors = dict[str, tuple[Tensor, Tensor]]
"""By layer: down, float [rank, inputs], and up, float [outputs, rank]."""

DOORS = ("context_embedder.weight", "time_text_embed.text_embedder.linear_1.weight")


@pytest.fixture(params=["sd3", "flux"])
def model(tokenizer_folder: Path, request: pytest.FixtureRequest) -> TextToImage:
    make = {
        "sd3": lambda: make_tiny_sd3(tokenizer_folder),
        "flux": lambda: make_tiny_flux(tokenizer_folder, guided=True),
    }[request.param]
    return TextToImage(make(), name=request.param, scheduler=None, t5_tokens=T5_TOKENS)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("prefix", ["", "transformer.", "pipe.transformer."], ids=["bare", "part", "pipe"])
def test_partial_weights_by_diffusers_names_are_taken(model: TextToImage, tmp_path: Path, prefix: str) -> None:
    """As ESD, UCE and OCE for FLUX save them."""
    own = named_parameters(model)
    names = (*DOORS, "transformer_blocks.0.attn.to_k.weight")
    changed = {name: own[name].detach() + 0.1 * noise(*own[name].shape) for name in names}
    save_file({f"{prefix}{name}": value for name, value in changed.items()}, tmp_path / "erased.safetensors")
    edit = edit_of(tmp_path / "erased.safetensors", model)
    assert set(edit.entries) == set(names)
    with edit.applied(model):
        for name, value in changed.items():
            torch.testing.assert_close(named_parameters(model)[name].detach(), value)


def factors_of(model: TextToImage, *layers: str) -> Factors:
    own = named_parameters(model)
    weights = {layer: own[f"{layer}.weight"] for layer in layers}
    return {layer: (noise(2, weight.shape[1]), 0.01 * noise(weight.shape[0], 2)) for layer, weight in weights.items()}


def keyed(factors: Factors, prefix: str = "") -> Weights:
    return {
        f"{prefix}{layer}.lora_{side}.weight": tensor
        for layer, pair in factors.items()
        for side, tensor in zip("AB", pair, strict=True)
    }


def by_diffusers(model: TextToImage, factors: Factors, folder: Path) -> Path:
    pipeline = {"sd3": StableDiffusion3Pipeline, "flux": FluxPipeline}[model.name]
    pipeline.save_lora_weights(folder, transformer_lora_layers=keyed(factors))
    return folder


def with_settings(model: TextToImage, factors: Factors, folder: Path) -> Path:
    settings = json.dumps({"transformer.r": 2, "transformer.lora_alpha": 6})
    file = folder / "pytorch_lora_weights.safetensors"
    save_file(keyed(factors, "transformer."), file, metadata={"lora_adapter_metadata": settings})
    return file


def by_peft(model: TextToImage, factors: Factors, folder: Path) -> Path:
    save_file(keyed(factors, "base_model.model."), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    return folder


@pytest.mark.parametrize(
    ("write", "scale"), [(by_diffusers, 1.0), (with_settings, 3.0), (by_peft, 2.0)], ids=["diffusers", "alpha", "peft"]
)
def test_low_rank_files_are_folded(
    model: TextToImage, tmp_path: Path, write: Callable[[TextToImage, Factors, Path], Path], scale: float
) -> None:
    # EraseAnything's adapters: keys and queries of the text in joint blocks.
    factors = factors_of(model, "transformer_blocks.0.attn.add_k_proj", "transformer_blocks.0.attn.add_q_proj")
    before = {layer: named_parameters(model)[f"{layer}.weight"].detach().clone() for layer in factors}
    edit = edit_of(write(model, factors, tmp_path), model)
    assert set(edit.entries) == {f"{layer}.weight" for layer in factors}
    with edit.applied(model):
        for layer, (down, up) in factors.items():
            now = named_parameters(model)[f"{layer}.weight"].detach()
            torch.testing.assert_close(now, before[layer] + scale * up @ down)


def test_an_exported_transformer_is_read_back(model: TextToImage, tmp_path: Path) -> None:
    name = "transformer_blocks.0.attn.add_k_proj"
    factors = factors_of(model, name)
    edit = edit_of(with_settings(model, factors, tmp_path), model)
    export(model, edit, tmp_path / "pipeline")
    again = edit_of(tmp_path / "pipeline" / "transformer", model)
    assert set(again.entries) == set(edit.entries) == {f"{name}.weight"}
    with pytest.raises(ValueError, match=r"pipeline has several text encoders, .*; give .*pipeline/transformer\.$"):
        edit_of(tmp_path / "pipeline", model)


WRONG: dict[str, tuple[Weights, str]] = {
    "empty": ({}, "holds no tensors"),
    "a U-Net's": ({"mid_block.attentions.0.proj_in.weight": torch.ones(2, 2)}, "have no place in it; choose the model"),
    "another width": ({DOORS[0]: torch.ones(3, 3)}, r"have no place in it; choose the model"),
    "half a pair": ({"transformer.context_embedder.lora_A.weight": torch.ones(2, 64)}, "have no place in it"),
    "the authors' names": (
        {"double_blocks.0.img_attn.qkv.weight": torch.ones(2, 2)},
        "are of a transformer in its authors' names, which are not read; convert it with diffusers",
    ),
    "kohya's": (
        {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 2)},
        "are of a transformer in its authors' names",
    ),
    "a third encoder's": (
        {"text_encoder_3.shared.weight": torch.ones(2, 2)},
        "of a second text encoder, whose changes cannot be taken over",
    ),
    "no numbers": ({DOORS[1]: torch.full((32, 56), float("nan"))}, "holds infinite values or none at all"),
}


@pytest.mark.parametrize(("content", "sentence"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused_in_one_sentence(
    tokenizer_folder: Path, tmp_path: Path, content: Weights, sentence: str
) -> None:
    model = TextToImage(make_tiny_sd3(tokenizer_folder), name="sd3", scheduler=None, t5_tokens=0)
    save_file(content, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match=sentence) as refusal:
        edit_of(tmp_path / "wrong.safetensors", model)
    assert str(refusal.value).count("\n") == 0
