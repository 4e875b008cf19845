import json
import re
import shutil
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import constants
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from diffusion import sources
from diffusion.loading import ModelSource, load_model
from diffusion.model import TextToImage
from tests.conftest import make_tiny_pipeline
from tests.networks import write_hub_cache

GENERATION = {"seeds": [3, 4], "steps": 1, "guidance": 5.0}
PROMPTS = ["a church", "a gas pump on fire"]


@pytest.fixture(scope="session")
def half_folder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline as a diffusers folder in float16, as the canvas is shipped."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_pipeline(tokenizer_folder).to(torch.float16).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(half_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(half_folder, tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def hub_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


LEVELS, LAYERS = 2, 1
"""Of the tiny U-Net and VAE."""

RESNET = [
    (r"norm1", "in_layers.0"),
    (r"conv1", "in_layers.2"),
    (r"time_emb_proj", "emb_layers.1"),
    (r"norm2", "out_layers.0"),
    (r"conv2", "out_layers.3"),
    (r"conv_shortcut", "skip_connection"),
]


def unet_name(name: str) -> str:
    """The name that CompVis' code gives to a weight of the U-Net."""
    if ".resnets." in name:
        for here, there in RESNET:
            name = name.replace(f".{here}.", f".{there}.")
    name = name.replace("time_embedding.linear_1", "time_embed.0").replace("time_embedding.linear_2", "time_embed.2")
    name = name.replace("conv_norm_out", "out.0").replace("conv_out", "out.2").replace("conv_in", "input_blocks.0.0")
    for number, part in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        name = name.replace(f"mid_block.{part}", f"middle_block.{number}")
    for level in range(LEVELS):
        for layer in range(LAYERS + 1):
            index = level * (LAYERS + 1) + layer
            for place, part in enumerate(("resnets", "attentions")):
                name = name.replace(f"down_blocks.{level}.{part}.{layer}", f"input_blocks.{1 + index}.{place}")
                name = name.replace(f"up_blocks.{level}.{part}.{layer}", f"output_blocks.{index}.{place}")
        last = level * (LAYERS + 1) + LAYERS
        name = name.replace(f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{1 + last}.0.op")
        name = name.replace(f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{last}.2.conv")
    return f"model.diffusion_model.{name}"


def vae_name(name: str) -> str:
    """The name that CompVis' code gives to a weight of the autoencoder."""
    for level in range(LEVELS):
        name = name.replace(f"down_blocks.{level}.", f"down.{level}.").replace(
            f"up_blocks.{level}.", f"up.{LEVELS - 1 - level}."
        )
    for number in range(2):
        name = name.replace(f"mid_block.resnets.{number}", f"mid.block_{number + 1}")
    name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("resnets", "block")
    name = name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    for here, there in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        name = name.replace(f"attn_1.{here}", f"attn_1.{there}")
    return f"first_stage_model.{name}"


def single_file_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The folder's weights in one dict, named as in Stable Diffusion's published checkpoints."""
    weights = {}
    for name, value in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items():
        weights[unet_name(name)] = value
    for name, value in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").items():
        is_projection = "attentions" in name and "group_norm" not in name and name.endswith("weight")
        weights[vae_name(name)] = value[:, :, None, None] if is_projection else value
    for name, value in load_file(folder / "text_encoder" / "model.safetensors").items():
        weights[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    return weights


def assert_same_weights(one: TextToImage, other: TextToImage):
    assert one.fingerprint() == other.fingerprint()


@pytest.mark.parametrize(
    ("precision", "weights", "autocast"),
    [
        ("fp32", torch.float32, None),
        ("fp16", torch.float16, None),
        ("bf16", torch.bfloat16, None),
        ("bf16_autocast", torch.float32, torch.bfloat16),
    ],
)
def test_every_part_has_the_wanted_precision_and_generates(half_folder: Path, precision, weights, autocast):
    model = load_model(str(half_folder), precision=precision, device="cpu")
    for part in (model.network, model.vae, model.text_encoder):
        assert {parameter.dtype for parameter in part.parameters()} == {weights}
    assert model.autocast == autocast
    pictures = model.generate(PROMPTS, **GENERATION)
    reference = load_model(str(half_folder), device="cpu").generate(PROMPTS, **GENERATION)
    assert (pictures.float() - reference.float()).abs().mean() < 4


def test_a_folder_gives_its_weights_name_and_scheduler(half_folder: Path):
    model = load_model(str(half_folder), scheduler="lms", device="cpu")
    expected = load_file(half_folder / "unet" / "diffusion_pytorch_model.safetensors")
    state = model.network.state_dict()
    assert all(torch.equal(state[name], value.float()) for name, value in expected.items())
    assert (model.name, model.scheduler_name) == ("tiny", "lms")
    assert load_model(str(half_folder), name="mine", device="cpu").name == "mine"


def test_the_canvas_is_a_folder_like_any_other(half_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(sources, "CANVAS_FOLDER", half_folder)
    canvas = load_model("canvas", device="cpu")
    assert canvas.name == "canvas"
    assert_same_weights(canvas, load_model(str(half_folder), device="cpu"))
    monkeypatch.setattr(sources, "CANVAS_FOLDER", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="make canvas"):
        load_model("canvas")


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_single_file_gives_the_folders_model(half_folder: Path, tmp_path: Path, suffix: str, hub_is_silent: None):
    weights, path = single_file_weights(half_folder), tmp_path / f"single.v1.{suffix}"
    if suffix == "ckpt":
        torch.save({"state_dict": weights, "global_step": 7}, path)
    else:
        save_file(weights, path)
    model = load_model(str(path), config=str(half_folder), device="cpu")
    assert model.name == "single.v1"
    assert_same_weights(model, load_model(str(half_folder), device="cpu"))


@pytest.mark.parametrize(
    ("mark", "stated", "expected", "last"),
    [
        ((), None, "epsilon", False),
        (("v_pred",), None, "v_prediction", False),
        (("v_pred", "ztsnr"), None, "v_prediction", True),
        ((), "sample", "sample", False),
        (("v_pred",), "epsilon", "epsilon", False),
    ],
)
def test_a_single_file_says_what_it_predicts_or_is_told(
    half_folder: Path,
    tmp_path: Path,
    mark: tuple[str, ...],
    stated: str | None,
    expected: str,
    last: bool,
    hub_is_silent: None,
):
    path = tmp_path / "single.safetensors"
    save_file(single_file_weights(half_folder) | {name: torch.empty(0) for name in mark}, path)
    model = ModelSource(str(path), config=str(half_folder), device="cpu", prediction_type=stated).load()
    assert model.process.prediction_type == expected
    assert (int(model.sampling_timesteps(5)[0]) == 999) == last
    assert (float(model.process.alphas[-1]) < 1e-6) == last
    model.generate(PROMPTS, **GENERATION)


def test_a_folder_is_told_what_it_predicts(half_folder: Path):
    told = ModelSource(str(half_folder), device="cpu", prediction_type="v_prediction").load()
    assert told.process.prediction_type == "v_prediction"
    assert ModelSource(str(half_folder), device="cpu").load().process.prediction_type == "epsilon"


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_code_in_a_checkpoint_is_refused_and_never_runs(half_folder: Path, tmp_path: Path, hub_is_silent: None):
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": single_file_weights(half_folder), "callbacks": Evil(tmp_path / "ran")}, path)
    with pytest.raises(ValueError, match=r"evil\.ckpt cannot be read"):
        load_model(str(path), config=str(half_folder))
    assert not (tmp_path / "ran").exists()


def test_trainer_classes_in_published_checkpoints_are_passed_over(
    half_folder: Path, tmp_path: Path, hub_is_silent: None
):
    callback = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks"})
    path = tmp_path / "published.ckpt"
    module = types.ModuleType("pytorch_lightning.callbacks")
    module.ModelCheckpoint = callback
    sys.modules["pytorch_lightning"] = types.ModuleType("pytorch_lightning")
    sys.modules["pytorch_lightning.callbacks"] = module
    try:
        torch.save({"state_dict": single_file_weights(half_folder), "callbacks": {callback: {"best": 1}}}, path)
    finally:
        del sys.modules["pytorch_lightning"], sys.modules["pytorch_lightning.callbacks"]
    assert_same_weights(load_model(str(path), config=str(half_folder)), load_model(str(half_folder)))


def test_a_single_file_without_configuration_says_where_to_get_it(
    half_folder: Path, tmp_path: Path, hub_is_silent: None
):
    path = tmp_path / "single.safetensors"
    save_file(single_file_weights(half_folder), path)
    with pytest.raises(ValueError, match=r"model\.config"):
        load_model(str(path))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_truncated_weights_are_named(folder: Path, part: str):
    weights = next((folder / part).glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(ValueError, match="tiny cannot be read") as error:
        load_model(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_truncated_single_file_is_named(half_folder: Path, tmp_path: Path, suffix: str, hub_is_silent: None):
    path = tmp_path / f"half.{suffix}"
    path.write_bytes((half_folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match="cannot be read; the file may be damaged") as error:
        load_model(str(path), config=str(half_folder))
    assert "\n" not in str(error.value)


def test_missing_parts_are_named(folder: Path):
    shutil.rmtree(folder / "vae")
    with pytest.raises(ValueError, match="tiny cannot be read"):
        load_model(str(folder))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "vae": [None, None]}))
    with pytest.raises(ValueError, match="it lacks vae"):
        load_model(str(folder))
    (folder / "model_index.json").write_text(json.dumps({**index, "text_encoder_2": ["transformers", "CLIPTextModel"]}))
    with pytest.raises(ValueError, match="second text encoder"):
        load_model(str(folder))
    (folder / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match=r"model_index\.json cannot be read"):
        load_model(str(folder))
    (folder / "model_index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model_index\.json"):
        load_model(str(folder))


@pytest.mark.parametrize("source", ["/no/such/folder", "nowhere.safetensors", "owner/model.ckpt", "canvass", ""])
def test_a_source_that_is_nothing_lists_what_it_can_be(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((FileNotFoundError, ValueError), match=r"'canvas', a diffusers folder|model_index"):
        load_model(source)


def test_a_file_of_another_kind_is_refused(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"must end in \.safetensors or \.ckpt"):
        load_model(str(tmp_path / "notes.txt"))


@pytest.mark.parametrize("offline", [True, False])
def test_an_unknown_hub_id_without_network_is_one_quick_sentence(monkeypatch: pytest.MonkeyPatch, offline: bool):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    # An address that swallows packets, as a blocked network does.
    monkeypatch.setattr(constants, "ENDPOINT", "https://192.0.2.1")
    start = time.monotonic()
    with pytest.raises(FileNotFoundError) as error:
        load_model("nobody/nothing")
    assert time.monotonic() - start < 5
    message = str(error.value)
    assert "\n" not in message
    for needed in ("'nobody/nothing'", str(constants.HF_HUB_CACHE), "hf download nobody/nothing", "model.source="):
        assert needed in message


def test_a_cached_hub_model_loads_without_network(
    half_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub_is_silent: None
):
    write_hub_cache(tmp_path, "someone/tiny", half_folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    from_pretrained = StableDiffusionPipeline.from_pretrained
    monkeypatch.setattr(
        StableDiffusionPipeline,
        "from_pretrained",
        lambda source, **options: from_pretrained(source, cache_dir=tmp_path, **options),
    )
    model = load_model("someone/tiny", device="cpu")
    assert model.name == "tiny"
    assert_same_weights(model, load_model(str(half_folder), device="cpu"))


def test_a_cache_without_all_weights_is_not_the_model(
    half_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub_is_silent: None
):
    snapshot = write_hub_cache(tmp_path, "someone/tiny", half_folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert sources.locate("someone/tiny") is None
    weights = snapshot / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("another_name.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"'someone/tiny' is neither .* nor complete in the cache"):
        sources.locate("someone/tiny")
    weights.symlink_to(snapshot / "not_yet")
    assert not sources.is_cached("someone/tiny")
    weights.unlink()
    weights.touch()
    assert sources.is_cached("someone/tiny")
    shutil.rmtree(snapshot / "tokenizer")
    assert not sources.is_cached("someone/tiny")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused_before_loading():
    with pytest.raises(ValidationError, match="finds no GPU"):
        ModelSource("/nowhere", device="cuda")


@pytest.mark.parametrize("field", [{"precision": "fp8"}, {"scheduler": "heun"}, {"device": "tpu"}, {"size": 3}])
def test_wrong_fields_are_refused_before_loading(field: dict[str, object]):
    with pytest.raises(ValidationError, match=next(iter(field))):
        ModelSource("/nowhere", **field)


def test_a_lookup_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources, "_HUB_SECONDS", 0.2)
    monkeypatch.setattr(sources, "get_session", lambda: time.sleep(30))
    start = time.monotonic()
    assert not sources.hub_answers()
    assert time.monotonic() - start < 5


def test_the_options_reach_the_model(half_folder: Path):
    options = {"precision": "fp16_autocast", "resolution": 32, "gradient_checkpointing": True, "offload": True}
    model = ModelSource(str(half_folder), device="cpu", **options).load()
    assert (model.autocast, model.dtype) == (torch.float16, torch.float32)
    assert model.image_size == (32, 32)
    assert model.autoencoder.offload
    assert model.network.is_gradient_checkpointing
    assert model.generate(PROMPTS, **GENERATION).shape == (2, 3, 32, 32)


@pytest.mark.parametrize("resolution", [10, 30, [32, 30], [10, 32]])
def test_a_resolution_that_the_levels_do_not_divide_is_refused(half_folder: Path, resolution: Any):
    with pytest.raises(ValueError, match=rf"resolution is {re.escape(str(resolution))}; 'tiny' takes a multiple of 4"):
        ModelSource(str(half_folder), device="cpu", resolution=resolution).load()


def test_pictures_may_be_wider_than_high(half_folder: Path):
    model = ModelSource(str(half_folder), device="cpu", resolution=[48, 32]).load()
    pictures = model.generate(["a church"], seeds=[1], steps=1, guidance=3)
    assert model.image_size == (32, 48)
    assert pictures.shape == (1, 3, 32, 48)


def test_a_vae_that_shifts_its_latents_is_refused(folder: Path):
    config = folder / "vae" / "config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"latents_mean": [0.1] * 4, "latents_std": [1.0] * 4})
    )
    with pytest.raises(ValueError, match="The VAE of 'tiny' shifts its latents"):
        load_model(str(folder), device="cpu")


def rename_weights(folder: Path, variant: str) -> None:
    for file in list(folder.rglob("*model.safetensors")):
        file.rename(file.with_suffix(f".{variant}.safetensors"))


@pytest.mark.parametrize("parts", [".", "unet", "text_encoder"], ids=["all", "unet", "text encoder"])
@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_a_folder_with_half_precision_files_alone_is_loaded(folder: Path, half_folder: Path, parts: str, variant: str):
    rename_weights(folder / parts, variant)
    assert_same_weights(load_model(str(folder), device="cpu"), load_model(str(half_folder), device="cpu"))


def test_a_cached_model_with_half_precision_files_alone_is_complete(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub_is_silent: None
):
    rename_weights(folder, "fp16")
    write_hub_cache(tmp_path / "cache", "someone/tiny", folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    from_pretrained = StableDiffusionPipeline.from_pretrained
    monkeypatch.setattr(
        StableDiffusionPipeline,
        "from_pretrained",
        lambda source, **options: from_pretrained(source, cache_dir=tmp_path / "cache", **options),
    )
    assert sources.is_cached("someone/tiny")
    assert load_model("someone/tiny", device="cpu").name == "tiny"


def test_split_weights_of_a_folder_are_loaded(folder: Path, half_folder: Path):
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = list(load_file(unet).items())
    unet.unlink()
    weight_map = {}
    for number, part in enumerate((weights[::2], weights[1::2]), start=1):
        name = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file(dict(part), folder / "unet" / name, {"format": "pt"})
        weight_map |= dict.fromkeys(dict(part), name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))

    assert_same_weights(load_model(str(folder), device="cpu"), load_model(str(half_folder), device="cpu"))


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_a_pointer_in_a_models_folder_is_called_one(folder: Path, part: str):
    (folder / part).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:46\nsize 343\n")
    with pytest.raises(
        ValueError, match=rf"it holds {part}, which is a pointer of Git LFS .*run `git lfs pull`"
    ) as error:
        load_model(str(folder), device="cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_page_in_a_single_files_place_is_called_one(
    half_folder: Path, tmp_path: Path, suffix: str, hub_is_silent: None
):
    path = tmp_path / f"page.{suffix}"
    path.write_text("<!doctype html><html><body>Sign in</body></html>")
    with pytest.raises(ValueError, match=r"cannot be read: it is a web page"):
        load_model(str(path), config=str(half_folder))


def test_a_checkpoint_with_numbers_of_numpy_is_read(half_folder: Path, tmp_path: Path, hub_is_silent: None):
    path = tmp_path / "numpy.ckpt"
    content = {"state_dict": single_file_weights(half_folder), "best": np.float64(0.5), "step": np.int64(3)}
    torch.save(content, path)
    assert_same_weights(load_model(str(path), config=str(half_folder)), load_model(str(half_folder)))


def test_a_tokenizer_without_a_length_takes_the_text_encoders(folder: Path, half_folder: Path):
    config = folder / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    del settings["model_max_length"]
    config.write_text(json.dumps(settings))
    model = load_model(str(folder), device="cpu")

    assert model.max_tokens == 24
    expected = load_model(str(half_folder), device="cpu").encode(PROMPTS)
    assert torch.equal(model.encode(PROMPTS), expected)


@pytest.mark.parametrize("channels", [9, 8, 5])
def test_a_unet_that_takes_more_than_latents_is_refused(folder: Path, channels: int):
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    unet = UNet2DConditionModel.from_config({**unet.config, "in_channels": channels})
    unet.save_pretrained(folder / "unet")
    with pytest.raises(ValueError, match=rf"takes {channels} channels and the latents of its VAE have 4; .*inpainting"):
        load_model(str(folder), device="cpu")


def test_a_part_of_another_library_is_refused_and_not_imported(folder: Path):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "unet": ["antigravity", "Unet"]}))
    with pytest.raises(ValueError, match="takes its unet from 'antigravity', and no code of a model is ever run"):
        load_model(str(folder), device="cpu")
    assert "antigravity" not in sys.modules


def test_a_configuration_that_is_no_folder_is_refused_when_it_is_named():
    with pytest.raises(ValidationError, match="config is '/nope', which is no diffusers folder"):
        ModelSource("model.safetensors", config="/nope")
