"""One file in CompVis' names: read back by diffusers, it is the same model."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

from diffusion.canvas.plan import make_scheduler
from diffusion.canvas.tiny import tiny_clip_config
from diffusion.compvis import single_file_weights
from diffusion.loading import load_model, model_source
from diffusion.model import TextToImage
from tests import test_loading
from tests.conftest import make_tiny_pipeline
from tests.test_sdxl import make_tiny_sdxl


def make_tiny_sd2(tokenizer_folder: Path) -> StableDiffusionPipeline:
    """Stable Diffusion 2's layout: OpenCLIP's activation, linear projections, one level of each path unattentive."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=2,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        use_linear_projection=True,
        cross_attention_dim=32,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=32,
    )
    scheduler = type(make_scheduler()).from_config(make_scheduler().config, prediction_type="v_prediction")
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(tiny_clip_config(tokenizer, hidden_act="gelu", num_hidden_layers=3)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


MAKERS = {"1": make_tiny_pipeline, "2": make_tiny_sd2, "xl": make_tiny_sdxl}


@pytest.mark.parametrize("kind", MAKERS)
def test_one_file_is_read_back_as_the_model(
    kind: str, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_source, "hub_answers", lambda: False)
    pipeline = MAKERS[kind](tokenizer_folder)
    pipeline.save_pretrained(tmp_path / "folder")
    model = TextToImage(pipeline, name="tiny")
    save_file(single_file_weights(model), tmp_path / "one.safetensors")
    again = load_model(str(tmp_path / "one.safetensors"), config=str(tmp_path / "folder"), device="cpu")
    assert again.fingerprint() == model.fingerprint()
    assert (
        again.process.prediction_type == model.process.prediction_type == ("v_prediction" if kind == "2" else "epsilon")
    )


def test_the_names_are_those_of_published_files(tokenizer_folder: Path, tmp_path: Path) -> None:
    pipeline = make_tiny_pipeline(tokenizer_folder)
    pipeline.save_pretrained(tmp_path)
    assert single_file_weights(TextToImage(pipeline)).keys() == test_loading.single_file_weights(tmp_path).keys()
    second = single_file_weights(TextToImage(make_tiny_sd2(tokenizer_folder)))
    # Where there is no attention the upsampler stands second, as in Stable Diffusion's output_blocks.2.
    for name in (
        "model.diffusion_model.output_blocks.2.1.conv.weight",
        "model.diffusion_model.input_blocks.3.0.op.weight",
        "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight",
        "first_stage_model.decoder.up.2.upsample.conv.bias",
    ):
        assert name in second


def test_added_tokens_are_refused(tokenizer_folder: Path) -> None:
    pipeline = make_tiny_pipeline(tokenizer_folder)
    pipeline.tokenizer.add_tokens("<mine>")
    with pytest.raises(ValueError, match="The tokens <mine> were added to 'tiny', which one file in CompVis' names"):
        single_file_weights(TextToImage(pipeline, name="tiny"))
