"""Stable Diffusion 3: text and picture in one sequence, velocity in place of noise, behind the same interface."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from diffusion.identity import configuration, identity
from diffusion.loading import ModelSource
from diffusion.loading.model_source import place
from diffusion.model import TextToImage
from diffusion.parameters import matching_parameters
from diffusion.processes.flow import RectifiedFlow
from erasure.attention import recorded_attention
from erasure.edit import Edit
from erasure.export import export
from erasure.parameters import UNET_SCOPES, scope_parameters
from tests.tiny_sd3 import JOINT, T5_TOKENS, TOKENS, WIDTHS, make_tiny_sd3

PROMPTS = ["a church", "a red fish"]


@pytest.fixture(params=[False, True], ids=["no_t5", "t5"])
def pipeline(tokenizer_folder: Path, request: pytest.FixtureRequest) -> StableDiffusion3Pipeline:
    return make_tiny_sd3(tokenizer_folder, t5=request.param)


def sd3(pipeline: StableDiffusion3Pipeline) -> TextToImage:
    return TextToImage(pipeline, name="tiny-sd3", scheduler=None, t5_tokens=T5_TOKENS)


def plain_pictures(pipeline: StableDiffusion3Pipeline, model: TextToImage, guidance: float) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPTS,
        num_inference_steps=3,
        guidance_scale=guidance,
        latents=model.initial_latents([1, 2]),
        height=16,
        width=16,
        max_sequence_length=T5_TOKENS,
        output_type="np",
    ).images


def assert_same_pictures(ours: torch.Tensor, theirs: np.ndarray) -> None:
    difference = ours.permute(0, 2, 3, 1).numpy().astype(int) - (theirs * 255).round().astype(int)
    assert np.abs(difference).max() <= 1
    assert theirs.std() > 0.01


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_pictures_are_those_of_the_plain_pipeline(pipeline: StableDiffusion3Pipeline, guidance: float) -> None:
    model = sd3(pipeline)
    ours = model.generate(PROMPTS, seeds=[1, 2], steps=3, guidance=guidance)
    theirs = plain_pictures(pipeline, model, guidance)
    assert_same_pictures(ours, theirs)
    # The two prompts are told apart, or any text would do.
    assert np.abs(np.diff(theirs, axis=0)).max() > 0.01
    assert model.unet_evaluations == 2 * 3 * (1 if guidance == 1 else 2)


def test_text_is_that_of_the_plain_pipeline(pipeline: StableDiffusion3Pipeline) -> None:
    model = sd3(pipeline)
    text = model.encode(PROMPTS)
    rows, _, pooled, _ = pipeline.encode_prompt(
        *[PROMPTS] * 3, do_classifier_free_guidance=False, max_sequence_length=T5_TOKENS
    )
    assert text.shape == (2, *model.text_shape) == (2, TOKENS + T5_TOKENS + 1, JOINT)
    ours, own_pooled = model.text_encoders.split(text)
    torch.testing.assert_close(ours, rows)
    torch.testing.assert_close(own_pooled, pooled)
    # Where no prompts are at hand, T5 reads what the ids spell.
    torch.testing.assert_close(model.encode_ids(model.tokenize(PROMPTS)), text)


@pytest.mark.parametrize("t5", [False, True])
def test_a_folder_is_loaded_by_its_index(tokenizer_folder: Path, tmp_path: Path, t5: bool) -> None:
    make_tiny_sd3(tokenizer_folder, t5=t5).save_pretrained(tmp_path / "model")
    model = ModelSource(str(tmp_path / "model"), device="cpu", scheduler="flow_euler", t5_tokens=T5_TOKENS).load()
    assert model.text_encoders.reads_text == t5
    without = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
    plain = StableDiffusion3Pipeline.from_pretrained(tmp_path / "model", **without)
    assert_same_pictures(
        model.generate(PROMPTS, seeds=[1, 2], steps=3, guidance=5.0), plain_pictures(plain, model, 5.0)
    )


def test_t5_can_be_left_out(tokenizer_folder: Path, tmp_path: Path) -> None:
    make_tiny_sd3(tokenizer_folder, t5=True).save_pretrained(tmp_path / "model")
    without = ModelSource(str(tmp_path / "model"), scheduler="flow_euler", t5=False, t5_tokens=0).load()
    assert not without.text_encoders.reads_text
    assert without.text_shape == (TOKENS + 1, JOINT)


def test_samplers_of_another_process_are_refused_by_name(tokenizer_folder: Path) -> None:
    with pytest.raises(ValueError, match="scheduler is 'ddim'; it must be one of flow_euler for 'x', which pre"):
        TextToImage(make_tiny_sd3(tokenizer_folder), name="x", scheduler="ddim")


@pytest.mark.parametrize(("resolution", "problem"), [(18, "a multiple of 4 pixels"), (36, "32 pixels at most")])
def test_sizes_that_it_does_not_take_are_refused(tokenizer_folder: Path, resolution: int, problem: str) -> None:
    with pytest.raises(ValueError, match=f"resolution is {resolution}; 'x' takes {problem}"):
        TextToImage(make_tiny_sd3(tokenizer_folder), name="x", scheduler=None, resolution=resolution)


def test_other_transformers_are_refused_by_name(tokenizer_folder: Path, tmp_path: Path) -> None:
    make_tiny_sd3(tokenizer_folder).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": "PixArtAlphaPipeline"}))
    with pytest.raises(ValueError, match="is a model of PixArtAlphaPipeline, which is not known here; name a model of"):
        ModelSource(str(tmp_path), scheduler="flow_euler").load()


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noise_process_is_that_of_the_scheduler(tokenizer_folder: Path, shift: float) -> None:
    pipeline = make_tiny_sd3(tokenizer_folder, shift=shift)
    process = sd3(pipeline).process
    generator = torch.Generator().manual_seed(0)
    pictures, noise = torch.randn((2, 3, 4, 8, 8), generator=generator)
    sampler = process.sampler("flow_euler", 5)
    pipeline.scheduler.set_timesteps(5)
    torch.testing.assert_close(sampler.timesteps, pipeline.scheduler.timesteps)
    torch.testing.assert_close(sampler.sigmas, pipeline.scheduler.sigmas)
    # x_s, and the way from it to either end along the true velocity.
    timesteps = torch.tensor([100.0, 500.5, 1000.0])
    latents, velocity = process.noised(pictures, noise, timesteps), process.target(pictures, noise)
    share = (timesteps / 1000)[:, None, None, None]
    torch.testing.assert_close(latents - share * velocity, pictures)
    torch.testing.assert_close(latents + (1 - share) * velocity, noise)
    torch.testing.assert_close(process.move(latents[:1], velocity[:1], 0.1, 0.0), pictures[:1])


def test_a_dynamic_shift_grows_with_the_picture() -> None:
    dynamic = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    shifts = [RectifiedFlow(dynamic, tokens, "x").shift for tokens in (256, 4096)]
    assert shifts == pytest.approx([1.6487, 3.1582], rel=1e-4)
    with pytest.raises(ValueError, match="use_karras_sigmas=True; a fixed or dynamic shift is all that is known"):
        RectifiedFlow({"use_karras_sigmas": True}, 256, "x")


def test_drawn_timesteps_are_logit_normal_or_uniform_before_the_shift() -> None:
    def quartiles(density: str) -> list[float]:
        flow = RectifiedFlow({"shift": 3.0}, 16, "x", density=density)
        drawn = flow.draw(20_000, torch.Generator().manual_seed(0)) / 1000
        return torch.quantile(drawn, torch.tensor([0.25, 0.5, 0.75])).tolist()

    assert quartiles("logit_normal") == pytest.approx([0.604, 0.75, 0.855], abs=0.01)
    assert quartiles("uniform") == pytest.approx([0.5, 0.75, 0.9], abs=0.01)


SELECTED = {
    "xattn": 2 * 8 - 2,
    "xattn_kv": 2 * 4,
    "selfattn": 2 * 8,
    "ffn": 2 * 4,
    "ffn_text": 4,
    "text_projection": 2 + 4,
}
"""How many parameters of two blocks, whose last has no output for text."""


@pytest.mark.parametrize("scope", UNET_SCOPES)
def test_scopes_select_what_they_say(tokenizer_folder: Path, scope: str) -> None:
    selected = scope_parameters(sd3(make_tiny_sd3(tokenizer_folder)), scope)
    assert len(selected) == SELECTED.get(scope, len(selected))


def test_the_second_image_attention_is_no_cross_attention(tokenizer_folder: Path) -> None:
    model = sd3(make_tiny_sd3(tokenizer_folder, dual=True))
    dual = {name for name, _ in model.network.named_parameters() if ".attn2.to_" in name}
    assert len(dual) == 8
    for scope in ("xattn", "xattn_kv", "xattn_ffn"):
        assert not dual & scope_parameters(model, scope).keys()
    assert dual <= scope_parameters(model, "selfattn").keys()
    with pytest.raises(ValueError, match="has no cross-attention"):
        model.denoiser.text_attention()
    with pytest.raises(ValueError, match="has no cross-attention"):
        matching_parameters(model, "*.attn2.*")


@pytest.mark.parametrize("qk_norm", ["rms_norm", None])
def test_attention_to_text_is_what_the_blocks_compute(tokenizer_folder: Path, qk_norm: str | None) -> None:
    model = sd3(make_tiny_sd3(tokenizer_folder, dual=True, qk_norm=qk_norm))
    model.network.double()
    layer = model.network.transformer_blocks[0].attn
    seen: dict[str, torch.Tensor] = {}
    for name in ("to_v", "add_v_proj"):
        getattr(layer, name).register_forward_hook(lambda _, __, output, name=name: seen.update({name: output}))
    layer.to_out[0].register_forward_pre_hook(lambda _, inputs: seen.update({"mixed": inputs[0]}))
    with torch.no_grad(), recorded_attention(model) as record:
        model.predict(model.initial_latents([1, 2]), 500.0, model.encode(PROMPTS))
    first, second = record.probabilities()
    rows = TOKENS + T5_TOKENS
    assert first.shape == second.shape == (2, 4, 16, rows)
    assert bool((first.sum(-1) < 1).all())
    assert record.layer_pixels == [16]
    # What a picture's row takes from the picture itself is the rest: text alone is mixed if its values are zero.
    layer.to_v.weight.data.zero_()
    layer.to_v.bias.data.zero_()
    with torch.no_grad():
        model.predict(model.initial_latents([1, 2]), 500.0, model.encode(PROMPTS))
    values = seen["add_v_proj"].unflatten(-1, (4, -1)).transpose(1, 2)
    torch.testing.assert_close(seen["mixed"], (first @ values).transpose(1, 2).flatten(2))


def test_an_exported_edit_is_what_plain_diffusers_loads(tokenizer_folder: Path, tmp_path: Path) -> None:
    model = sd3(make_tiny_sd3(tokenizer_folder))
    parameters = scope_parameters(model, "xattn")
    base = {name: value.detach().clone() for name, value in parameters.items()}
    generator = torch.Generator().manual_seed(0)
    changed = {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in base.items()}
    edit = Edit.from_weights(base, changed)
    export(model, edit, tmp_path / "edited")
    plain = StableDiffusion3Pipeline.from_pretrained(tmp_path / "edited", text_encoder_3=None, tokenizer_3=None)
    before = model.generate(PROMPTS, seeds=[1, 2], steps=3, guidance=5.0)
    with edit.applied(model):
        ours = model.generate(PROMPTS, seeds=[1, 2], steps=3, guidance=5.0)
        beside = edit.unedited(model)
        assert torch.equal(beside.generate(PROMPTS, seeds=[1, 2], steps=3, guidance=5.0), before)
    assert_same_pictures(ours, plain_pictures(plain, model, 5.0))
    assert not torch.equal(ours, before)


def test_pictures_survive_the_autoencoder_with_its_shift(tokenizer_folder: Path) -> None:
    pipeline = make_tiny_sd3(tokenizer_folder)
    model = sd3(pipeline)
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    latents = model.encode_images(images)
    mean = pipeline.vae.encode(images.float() / 127.5 - 1).latent_dist.mean
    torch.testing.assert_close(latents, (mean - 0.06) * 1.5)


def test_embeddings_are_no_text_for_a_t5(tokenizer_folder: Path) -> None:
    model = sd3(make_tiny_sd3(tokenizer_folder, t5=True))
    ids = model.tokenize(PROMPTS)
    with pytest.raises(ValueError, match=r"no text for the model's T5; load the model with model\.t5=false"):
        model.encode_embeddings(model.token_embeddings(ids), model.text_encoders.ends(ids))


def test_embeddings_of_tokens_are_read_as_the_tokens(tokenizer_folder: Path) -> None:
    model = sd3(make_tiny_sd3(tokenizer_folder))
    ids = model.tokenize(PROMPTS)
    assert model.vocabulary.shape[1] == sum(WIDTHS)
    text = model.encode_embeddings(model.token_embeddings(ids), model.text_encoders.ends(ids))
    torch.testing.assert_close(text, model.encode_ids(ids))


def test_a_t5_is_with_the_network_only_while_it_reads(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = make_tiny_sd3(tokenizer_folder, t5=True)
    kept = sd3(pipeline).encode(PROMPTS)
    moves: list[str] = []
    to = pipeline.text_encoder_3.to
    monkeypatch.setattr(pipeline.text_encoder_3, "to", lambda device: moves.append(str(device)) or to(device))
    model = TextToImage(pipeline, name="tiny-sd3", scheduler=None, t5_tokens=T5_TOKENS, offload=True)
    assert moves == ["cpu"]
    text = model.encode_prompts(PROMPTS)
    torch.testing.assert_close(text, kept)
    assert moves == ["cpu"] * 3
    model.predict(model.initial_latents([1, 2]), 500.0, text)
    assert moves == ["cpu"] * 3
    with torch.enable_grad():
        rows = pipeline.text_encoder_3.get_input_embeddings().weight[:T5_TOKENS][None]
        model.text_encoders.t5.read_embeddings(rows)
    # It stays for the gradient that has to come back through it.
    assert moves == ["cpu"] * 4


def test_a_t5_that_waits_is_never_taken_to_the_gpu(tokenizer_folder: Path) -> None:
    pipeline = make_tiny_sd3(tokenizer_folder, t5=True)
    place(pipeline, torch.device("meta"), t5=False)
    assert {part: getattr(pipeline, part).device.type for part in ("transformer", "vae", "text_encoder_2")} == {
        "transformer": "meta",
        "vae": "meta",
        "text_encoder_2": "meta",
    }
    assert pipeline.text_encoder_3.device.type == "cpu"
    place(pipeline, torch.device("meta"), t5=True)
    assert pipeline.text_encoder_3.device.type == "meta"


def test_a_model_without_its_t5_is_another(tokenizer_folder: Path, tmp_path: Path) -> None:
    make_tiny_sd3(tokenizer_folder, t5=True).save_pretrained(tmp_path)
    settings = [{"t5": t5, "t5_tokens": tokens} for t5, tokens in ((True, 6), (False, 6), (False, 0))]
    models = [ModelSource(str(tmp_path), scheduler="flow_euler", **each).load() for each in settings]
    assert [configuration(model)["pipeline"] for model in models] == settings
    assert len({json.dumps(identity(model)) for model in models}) == 3
