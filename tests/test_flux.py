"""FLUX.1: T5 gives the rows, CLIP the pooled embedding, and guidance is embedded or distilled away."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from diffusion.denoisers.flux import packed, unpacked
from diffusion.loading import ModelSource
from diffusion.model import TextToImage
from erasure.parameters import UNET_SCOPES, scope_parameters
from erasure.pruning.structures import structure_of
from tests.tiny_flux import POOLED, make_tiny_flux
from tests.tiny_sd3 import JOINT, T5_TOKENS

PROMPTS = ["a church", "a red fish"]
SIZE = (16, 24)


def flux(pipeline: FluxPipeline) -> TextToImage:
    return TextToImage(pipeline, name="tiny-flux", scheduler=None, resolution=SIZE, t5_tokens=T5_TOKENS)


@pytest.mark.parametrize(("guided", "guidance"), [(True, 1.0), (True, 3.5), (False, 1.0)])
def test_pictures_are_those_of_the_plain_pipeline(tokenizer_folder: Path, guided: bool, guidance: float) -> None:
    pipeline = make_tiny_flux(tokenizer_folder, guided=guided)
    model = flux(pipeline)
    ours = model.generate(PROMPTS, seeds=[1, 2], steps=3, guidance=guidance)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPTS,
        num_inference_steps=3,
        guidance_scale=guidance,
        latents=packed(model.initial_latents([1, 2])),
        width=SIZE[0],
        height=SIZE[1],
        max_sequence_length=T5_TOKENS,
        output_type="np",
    ).images
    difference = ours.permute(0, 2, 3, 1).numpy().astype(int) - (theirs * 255).round().astype(int)
    assert np.abs(difference).max() <= 1
    assert theirs.std() > 0.01
    assert np.abs(np.diff(theirs, axis=0)).max() > 0.01
    # Whatever the guidance, one evaluation a step.
    assert model.unet_evaluations == 2 * 3
    assert model.evaluations_per_step(guidance) == 1


def test_guidance_is_embedded(tokenizer_folder: Path) -> None:
    model = flux(make_tiny_flux(tokenizer_folder, guided=True))
    text = model.encode(PROMPTS)
    low, high = (model.sample(text, seeds=[1, 2], steps=2, guidance=scale) for scale in (1.0, 30.0))
    assert not torch.allclose(low, high)
    # What erasers train on is a difference of predictions, as of any other model.
    latents = model.initial_latents([1, 2])
    guided = model.guided(latents, 500.0, text, model.encode([""])[0], 1.0)
    torch.testing.assert_close(guided, model.predict(latents, 500.0, text))


def test_a_distilled_model_refuses_guidance(tokenizer_folder: Path) -> None:
    model = flux(make_tiny_flux(tokenizer_folder, guided=False))
    with pytest.raises(ValueError, match=r"guidance is 7\.5; 'tiny-flux' is distilled and takes none: give"):
        model.generate(PROMPTS, seeds=[1, 2], steps=2, guidance=7.5)


def test_text_is_that_of_the_plain_pipeline(tokenizer_folder: Path) -> None:
    pipeline = make_tiny_flux(tokenizer_folder, guided=True)
    model = flux(pipeline)
    text = model.encode(PROMPTS)
    rows, pooled, _ = pipeline.encode_prompt(PROMPTS, PROMPTS, max_sequence_length=T5_TOKENS)
    assert text.shape == (2, *model.text_shape) == (2, T5_TOKENS + 1, JOINT)
    ours, own_pooled = model.text_encoders.split(text)
    torch.testing.assert_close(ours, rows)
    torch.testing.assert_close(own_pooled, pooled)
    assert own_pooled.shape == (2, POOLED)


def test_a_folder_is_loaded_by_its_index(tokenizer_folder: Path, tmp_path: Path) -> None:
    make_tiny_flux(tokenizer_folder, guided=True).save_pretrained(tmp_path / "model")
    loaded = ModelSource(
        str(tmp_path / "model"), device="cpu", scheduler="flow_euler", resolution=SIZE, t5_tokens=T5_TOKENS
    ).load()
    again = flux(FluxPipeline.from_pretrained(tmp_path / "model"))
    assert loaded.fingerprint() == again.fingerprint()
    one, other = (model.generate(PROMPTS, seeds=[1, 2], steps=2, guidance=3.5) for model in (loaded, again))
    assert (one.int() - other.int()).abs().max() <= 1
    plain = loaded.as_pipeline()
    assert isinstance(plain, FluxPipeline)
    plain.save_pretrained(tmp_path / "again")


def test_packing_keeps_every_latent_where_it_was() -> None:
    latents = torch.arange(2 * 4 * 6 * 8).reshape(2, 4, 6, 8)
    squares = packed(latents)
    assert squares.shape == (2, 12, 16)
    assert squares[0, 1, :4].tolist() == latents[0, 0, :2, 2:4].flatten().tolist()
    assert torch.equal(unpacked(squares, 3, 4), latents)


@pytest.mark.parametrize("scope", UNET_SCOPES)
def test_scopes_select_what_they_say(tokenizer_folder: Path, scope: str) -> None:
    model = flux(make_tiny_flux(tokenizer_folder, guided=True))
    selected = scope_parameters(model, scope)
    single = {name for name in selected if name.startswith("single_transformer_blocks.")}
    assert bool(single) == (scope not in {"xattn", "xattn_kv", "selfattn", "ffn2", "ffn_text", "text_projection"})
    if scope == "attn":
        # ESD's authors' esd-x: every attention projection, text's, the picture's and the shared ones.
        assert {name.split(".attn.")[1].split(".")[0] for name in selected} == {
            *("to_q", "to_k", "to_v", "to_out", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
        }


def test_heads_are_found_in_its_own_attention(tokenizer_folder: Path) -> None:
    model = flux(make_tiny_flux(tokenizer_folder, guided=True))
    weights = {name: value for name, value in scope_parameters(model, "attn").items() if value.ndim == 2}
    structure = structure_of(model, weights, "head")
    assert {structure.units[group] for group, _ in structure.places.values()} == {(2,)}
