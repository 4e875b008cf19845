"""The canvas's transformer: it learns, and becomes a folder that is loaded as any Stable Diffusion 3."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusion.canvas.mmdit import TransformerRecipe, assemble, read_captions, text_half, train_transformer
from diffusion.canvas.pictures import Drawings, draw_pictures
from diffusion.loading import ModelSource
from tests.networks import write_clip
from tests.tiny_sd3 import make_vae

RECIPE = TransformerRecipe(width=32, layers=2, positions=8, steps=4, batch=8, learning_rate=1e-2)


@pytest.fixture(scope="module")
def drawings() -> Drawings:
    return draw_pictures(12, seed=0, captions=2)


@pytest.fixture(scope="module")
def encoders(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[CLIPTextModelWithProjection]:
    folder = tmp_path_factory.mktemp("clips")
    return [
        text_half(CLIPModel.from_pretrained(write_clip(folder / str(width), tokenizer_folder, width=width)))
        for width in (16, 24)
    ]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="module")
def latents() -> torch.Tensor:
    return torch.randn((12, 4, 4, 4), generator=torch.Generator().manual_seed(0))


def train(
    drawings: Drawings, latents: torch.Tensor, tokenizer: CLIPTokenizer, encoders: list, **changes: int
) -> SD3Transformer2DModel:
    return train_transformer(replace(RECIPE, **changes), latents, drawings, tokenizer, encoders, None)


def test_captions_are_what_the_pipeline_reads(tokenizer: CLIPTokenizer, encoders: list) -> None:
    texts = read_captions(tokenizer, encoders, ["a church", ""])
    assert texts.rows.shape[::2] == (2, 64)
    assert texts.pooled.shape == (2, 40)
    assert not torch.equal(texts.rows[0], texts.rows[1])


def test_a_fresh_transformer_predicts_nothing_and_a_trained_one_something(
    drawings: Drawings, latents: torch.Tensor, tokenizer: CLIPTokenizer, encoders: list
) -> None:
    texts = read_captions(tokenizer, encoders, ["a church"])

    def prediction(transformer: SD3Transformer2DModel) -> torch.Tensor:
        with torch.no_grad():
            return transformer(latents[:1], texts.rows.float(), texts.pooled.float(), torch.tensor([500.0])).sample

    untrained, trained = (train(drawings, latents, tokenizer, encoders, steps=steps) for steps in (0, 4))
    assert not prediction(untrained).any()
    assert prediction(trained).any()
    # The same draws give the same weights.
    assert torch.equal(prediction(trained), prediction(train(drawings, latents, tokenizer, encoders)))


def test_the_folder_is_a_stable_diffusion_3(
    drawings: Drawings, latents: torch.Tensor, tokenizer: CLIPTokenizer, encoders: list, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    vae = make_vae(shift_factor=0.1)
    trained = train(drawings, latents, tokenizer, encoders)
    assemble(vae, trained, tokenizer, encoders).save_pretrained(tmp_path / "canvas")
    model = ModelSource(str(tmp_path / "canvas"), device="cpu", scheduler="flow_euler", t5_tokens=0).load()
    ours = model.generate(["a church", "a fish"], seeds=[1, 2], steps=3, guidance=4.0)
    plain = StableDiffusion3Pipeline.from_pretrained(tmp_path / "canvas", text_encoder_3=None, tokenizer_3=None)
    plain.set_progress_bar_config(disable=True)
    theirs = plain(
        ["a church", "a fish"],
        num_inference_steps=3,
        guidance_scale=4.0,
        latents=model.initial_latents([1, 2]),
        height=8,
        width=8,
        max_sequence_length=0,
        output_type="np",
    ).images
    difference = ours.permute(0, 2, 3, 1).numpy().astype(int) - (theirs * 255).round().astype(int)
    assert np.abs(difference).max() <= 1
    assert theirs.std() > 0.005
