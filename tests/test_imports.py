"""Files of other people's tools, written here as those write them: each gives the weights that its authors compute."""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from diffusion.model import TextToImage
from diffusion.parameters import TEXT_ENCODER_PREFIX, named_parameters
from erasure.additions.membranes import Membranes
from erasure.checkpoints import edit_of
from erasure.edit import Edit
from erasure.erasers.imported import Imported
from erasure.export import export
from erasure.imports.reading import read_checkpoint
from erasure.pruning.off import Off
from tests.test_checkpoints import CONCEPT, assert_becomes, compvis, erased, pickled, spm_file, whole_unet
from tests.test_loading import half_folder

__all__ = ["half_folder"]

Weights = dict[str, Tensor]
TABLE = "text_encoder.embeddings.token_embedding.weight"

WRAPPERS: dict[str, Callable[[Weights], object]] = {
    "DataParallel": lambda weights: {f"module.{name}": value for name, value in weights.items()},
    "torch.compile": lambda weights: {f"_orig_mod.{name}": value for name, value in weights.items()},
    "both": lambda weights: {f"module._orig_mod.{name}": value for name, value in weights.items()},
    "a part that was compiled": lambda weights: {f"unet._orig_mod.{name}": value for name, value in weights.items()},
    "inside a pipeline": lambda weights: {f"pipe.unet.{name}": value for name, value in weights.items()},
    "model_state_dict": lambda weights: {"epoch": 3, "model_state_dict": weights, "loss": 0.5},
    "model and optimizer": lambda weights: {
        "model": weights,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-5, "params": [0]}]},
        "lr_scheduler": {"last_epoch": 3},
    },
    "DeepSpeed": lambda weights: {"module": {f"module.{name}": value for name, value in weights.items()}},
    "parts and optimizer": lambda weights: {"unet": weights, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
    "numbers of NumPy": lambda weights: {
        "state_dict": compvis(weights),
        "best": np.float64(0.5),
        "step": np.int64(3),
        "history": np.arange(3.0),
    },
    "beside numbers": lambda weights: {**weights, "epoch": 3, "name": "esd"},
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_what_training_code_wraps_around_weights_is_taken_off(tiny_model, tmp_path, wrap):
    changed = erased(tiny_model)
    torch.save(wrap(changed), tmp_path / "erased.pt")

    assert_becomes(tiny_model, edit_of(tmp_path / "erased.pt", tiny_model), changed)


def test_weights_beside_other_weights_are_not_guessed_at(tiny_model, tmp_path):
    torch.save({"model": erased(tiny_model), "critic": {"head.weight": torch.ones(2)}}, tmp_path / "two.pt")

    with pytest.raises(ValueError, match=r"two.pt holds weights under 'model' and others under 'critic'"):
        edit_of(tmp_path / "two.pt", tiny_model)


class AdvUnlearnsEncoder(nn.Module):
    """The wrapper whose parameters AdvUnlearn saves: a text encoder, and its parts once more."""

    def __init__(self, encoder: CLIPTextModel) -> None:
        super().__init__()
        self.text_encoder = encoder
        self.embedding = encoder.embeddings
        self.encoder = encoder.encoder
        self.final_layer_norm = encoder.final_layer_norm


@pytest.mark.parametrize("text_model", [True, False], ids=["transformers 4", "transformers 5"])
def test_advunlearns_text_encoders_have_each_tensor_twice(tiny_model, tmp_path, text_model):
    changed = erased(tiny_model, scope="text_encoder")
    with Edit.from_weights(named_parameters(tiny_model), changed).applied(tiny_model):
        state = {k: v.clone() for k, v in AdvUnlearnsEncoder(tiny_model.text_encoder).state_dict().items()}
    assert {"embedding.token_embedding.weight", "text_encoder.embeddings.token_embedding.weight"} <= state.keys()
    if text_model:
        state = {key.replace("text_encoder.", "text_encoder.text_model."): value for key, value in state.items()}
    torch.save(state, tmp_path / "TextEncoder-text_encoder_full-epoch_999.pt")

    assert_becomes(tiny_model, edit_of(tmp_path / "TextEncoder-text_encoder_full-epoch_999.pt", tiny_model), changed)


def test_two_different_values_of_one_tensor_are_refused_with_the_reason(tiny_model, tmp_path):
    name = "encoder.layers.0.layer_norm1.bias"
    bias = tiny_model.text_encoder.get_parameter(name).detach()
    torch.save({f"text_encoder.{name}": bias + 1, name: bias + 2}, tmp_path / "te.pt")

    with pytest.raises(ValueError, match=r"two values of one parameter: 1 of 2 entries \('encoder.layers.0"):
        edit_of(tmp_path / "te.pt", tiny_model)


def with_added_tokens(model: TextToImage, folder: Path, changed: Weights, count: int) -> Path:
    """The folder of a pipeline whose vocabulary was extended, as FMN leaves it."""
    export(model, Edit.from_weights(named_parameters(model), changed), folder)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.tokenizer.add_tokens([f"<s{number}>" for number in range(count)])
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer))
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("half", [False, True])
def test_a_pipeline_with_added_tokens_changes_what_the_model_knows_and_tells_the_rest(
    tiny_model, tmp_path, caplog, half
):
    known = named_parameters(tiny_model)[TABLE].detach()
    table = known.clone()
    table[5] += 1
    changed = erased(tiny_model) | {TABLE: table}
    folder = with_added_tokens(tiny_model, tmp_path / "fmn", changed, 2)
    if half:
        StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).to(torch.float16).save_pretrained(folder)
        changed = {name: value.half().float() for name, value in changed.items()}
        changed[TABLE] = torch.where((table != known).any(dim=1, keepdim=True), changed[TABLE], known.half().float())

    with caplog.at_level(logging.INFO):
        edit = edit_of(folder, tiny_model)

    assert edit.entries.keys() == changed.keys()
    assert_becomes(tiny_model, edit, changed)
    assert "2 of embeddings of added tokens passed over" in caplog.text


def test_a_model_with_added_tokens_takes_a_table_without_them(tiny_model, tmp_path):
    table = named_parameters(tiny_model)[TABLE].detach().clone()
    table[5] += 1
    torch.save({TABLE: table}, tmp_path / "te.pt")
    tiny_model.text_encoder.resize_token_embeddings(len(table) + 1, mean_resizing=False)
    added = tiny_model.text_encoder.get_input_embeddings().weight.detach()[len(table) :].clone()

    assert_becomes(tiny_model, edit_of(tmp_path / "te.pt", tiny_model), {TABLE: torch.cat([table, added])})


def test_stereos_stage_file_is_its_unet_and_what_its_encoder_and_the_model_both_know(tiny_model, tmp_path):
    changed = erased(tiny_model)
    state = {f"unet.{name}": value for name, value in whole_unet(tiny_model, changed).items()}
    encoder = {f"text_encoder.text_model.{k}": v.clone() for k, v in tiny_model.text_encoder.state_dict().items()}
    [name] = [key for key in encoder if key.endswith("token_embedding.weight")]
    encoder[name] = torch.cat([encoder[name], torch.ones(2, 32)])
    vae = {f"vae.{name}": value for name, value in tiny_model.vae.state_dict().items()}
    saved = {"model_state_dict": {**vae, **encoder, **state}, "saved_tokens": {"0": "<art-0>", "1": "<art-1>"}}
    torch.save(saved, tmp_path / "ste_stage_model.pt")

    assert_becomes(tiny_model, edit_of(tmp_path / "ste_stage_model.pt", tiny_model), changed)


def test_acs_embed_is_the_token_table_or_the_embeddings_of_added_tokens(tiny_model, tmp_path, caplog):
    table = named_parameters(tiny_model)[TABLE].detach().clone()
    table[5] += 1
    torch.save({"state_dict": {"embed": table}}, tmp_path / "all.ckpt")
    assert_becomes(tiny_model, edit_of(tmp_path / "all.ckpt", tiny_model), {TABLE: table})

    changed = erased(tiny_model, scope="xattn_kv")
    torch.save({"state_dict": {**compvis(changed), "embed": torch.ones(2, 32)}}, tmp_path / "delta.ckpt")
    with caplog.at_level(logging.INFO):
        assert_becomes(tiny_model, edit_of(tmp_path / "delta.ckpt", tiny_model), changed)
    assert "2 of embeddings of added tokens passed over" in caplog.text

    torch.save({"state_dict": {"embed": torch.ones(2, 32)}}, tmp_path / "added.ckpt")
    with pytest.raises(ValueError, match=r"but the embeddings of 2 added tokens; name .* in model.embeddings"):
        edit_of(tmp_path / "added.ckpt", tiny_model)


def factors_of(model: TextToImage, *parts: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Down [2, inputs] and up [outputs, 2] by our names of some layers."""
    generator = torch.Generator().manual_seed(2)
    found = {}
    for name, weight in named_parameters(model).items():
        if name.endswith(".weight") and any(part in name for part in parts):
            rows, columns = weight.shape
            draw = [torch.randn(shape, generator=generator) for shape in ((2, columns), (rows, 2))]
            found[name.removesuffix(".weight")] = (draw[0], draw[1])
    return found


UNET_LAYERS = ("attn2.to_k", "attn2.to_out.0")
TEXT_LAYERS = ("layers.1.self_attn.q_proj",)


def inner(name: str) -> str:
    return name.removeprefix(TEXT_ENCODER_PREFIX)


def in_unet(name: str) -> bool:
    return not name.startswith(TEXT_ENCODER_PREFIX)


def kohya(factors: Mapping[str, tuple[Tensor, Tensor]], folder: Path, te: str = "te") -> Path:
    content = {}
    for name, (down, up) in factors.items():
        flat = inner(name).replace(".", "_")
        key = f"lora_unet_{flat}" if in_unet(name) else f"lora_{te}_text_model_{flat}"
        content |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.0)}
    save_file(content, folder / "kohya.safetensors")
    return folder / "kohya.safetensors"


def diffusers_lora(factors: Mapping[str, tuple[Tensor, Tensor]], folder: Path, **settings: object) -> Path:
    """By diffusers' own writer."""
    parts: dict[str, Weights] = {"unet": {}, "text_encoder": {}}
    metadata = {f"{part}_lora_adapter_metadata": settings for part in parts} if settings else {}
    for name, (down, up) in factors.items():
        part, layer = ("unet", name) if in_unet(name) else ("text_encoder", f"text_model.{inner(name)}")
        parts[part] |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=parts["unet"],
        text_encoder_lora_layers=parts["text_encoder"],
        **metadata,
    )
    return folder


def before_peft(factors: Mapping[str, tuple[Tensor, Tensor]], folder: Path) -> Path:
    content = {}
    for name, (down, up) in factors.items():
        part = "unet" if in_unet(name) else "text_encoder.text_model"
        layer = f"{part}.{inner(name)}.lora{'' if in_unet(name) else '_linear_layer'}"
        content |= {f"{layer}.down.weight": down, f"{layer}.up.weight": up}
    save_file(content, folder / "old.safetensors")
    return folder / "old.safetensors"


def attention_processors(factors: Mapping[str, tuple[Tensor, Tensor]], folder: Path) -> Path:
    content = {}
    for name, (down, up) in factors.items():
        block, _, projection = name.removesuffix(".0").rpartition(".")
        key = f"{block}.processor.{projection}_lora"
        content |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
    torch.save(content, folder / "pytorch_lora_weights.bin")
    return folder / "pytorch_lora_weights.bin"


def peft(factors: Mapping[str, tuple[Tensor, Tensor]], folder: Path, **settings: object) -> Path:
    content = {}
    for name, (down, up) in factors.items():
        key = f"base_model.model.{inner(name)}"
        content |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    save_file(content, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, **settings}))
    return folder


BOTH, UNET = (*UNET_LAYERS, *TEXT_LAYERS), UNET_LAYERS
LORAS: dict[str, tuple[tuple[str, ...], float, Callable[..., Path]]] = {
    "kohya with a text part": (BOTH, 0.5, kohya),
    "kohya of SDXL's first encoder": (BOTH, 0.5, lambda factors, folder: kohya(factors, folder, "te1")),
    "diffusers": (BOTH, 1.0, diffusers_lora),
    "diffusers with PEFT's settings": (
        BOTH,
        4.0,
        lambda factors, folder: diffusers_lora(factors, folder, r=2, lora_alpha=8),
    ),
    "diffusers before PEFT": (BOTH, 1.0, before_peft),
    "diffusers of 2023": (UNET, 1.0, attention_processors),
    "PEFT": (UNET, 3.0, lambda factors, folder: peft(factors, folder, lora_alpha=6)),
    "PEFT of a text encoder": (TEXT_LAYERS, 3.0, lambda factors, folder: peft(factors, folder, lora_alpha=6)),
    "PEFT, stabilised": (UNET, 2.0, lambda factors, folder: peft(factors, folder, lora_alpha=8**0.5, use_rslora=True)),
    "PEFT, the file in its folder": (
        UNET,
        3.0,
        lambda factors, folder: peft(factors, folder, lora_alpha=6) / "adapter_model.safetensors",
    ),
}


@pytest.mark.parametrize(("layers", "scale", "write"), LORAS.values(), ids=LORAS)
def test_low_rank_files_of_every_tool_are_folded(tiny_model64, tmp_path, layers, scale, write):
    factors = factors_of(tiny_model64, *layers)
    assert len(factors) >= len(layers)
    before = {name: value.detach().clone() for name, value in named_parameters(tiny_model64).items()}

    edit = edit_of(write(factors, tmp_path), tiny_model64)

    assert {name.removesuffix(".weight") for name in edit.entries} == factors.keys()
    with edit.applied(tiny_model64):
        for name, (down, up) in factors.items():
            expected = before[f"{name}.weight"] + scale * up.double() @ down.double()
            torch.testing.assert_close(named_parameters(tiny_model64)[f"{name}.weight"], expected)


def test_pefts_alpha_may_differ_by_layer(tiny_model64, tmp_path):
    factors = factors_of(tiny_model64, *UNET_LAYERS)
    path = peft(factors, tmp_path, lora_alpha=2, alpha_pattern={"attn2.to_k": 6})

    edit = edit_of(path, tiny_model64)

    before = {name: value.detach().clone() for name, value in named_parameters(tiny_model64).items()}
    with edit.applied(tiny_model64):
        for name, (down, up) in factors.items():
            scale = 3 if name.endswith("to_k") else 1
            expected = before[f"{name}.weight"] + scale * up.double() @ down.double()
            torch.testing.assert_close(named_parameters(tiny_model64)[f"{name}.weight"], expected)


def test_a_convolution_of_one_pixel_takes_linear_factors(tiny_model64, tmp_path):
    name = "mid_block.attentions.0.proj_in"
    weight = tiny_model64.network.get_parameter(f"{name}.weight").detach().clone()
    assert weight.shape[2:] == (1, 1)
    down, up = torch.randn(2, weight.shape[1]), torch.randn(len(weight), 2)
    save_file({f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}, tmp_path / "lora.safetensors")

    with edit_of(tmp_path / "lora.safetensors", tiny_model64).applied(tiny_model64):
        changed = tiny_model64.network.get_parameter(f"{name}.weight")
        torch.testing.assert_close(changed[:, :, 0, 0], weight[:, :, 0, 0] + up.double() @ down.double())


LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
NOT_FOLDED = {
    "LoHa": ({"lora_unet_mid_block_x.hada_w1_a": torch.ones(2, 2)}, "holds LoHa, .* merge it"),
    "DoRA": ({f"unet.{LAYER}.lora_magnitude_vector": torch.ones(2)}, "holds DoRA"),
    "LoKr": ({"lora_unet_mid_block_x.lokr_w1": torch.ones(2, 2)}, "holds LoKr"),
    "a second text encoder": (
        {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(2, 2)},
        "changes a second text encoder",
    ),
    "PEFT without its settings": (
        {f"base_model.model.{LAYER}.lora_A.weight": torch.ones(2, 32)},
        "keeps the strength of a change in adapter_config.json; put that file beside it",
    ),
    "a layer of another model": ({"unet.mid_block.nothing.lora_A.weight": torch.ones(2, 32)}, "1 of 1 entries"),
    "one factor": ({f"unet.{LAYER}.lora_A.weight": torch.ones(2, 32)}, "1 of 1 entries"),
    "OpenCLIP": (
        {"cond_stage_model.model.transformer.resblocks.0.ln_1.weight": torch.ones(2)},
        "a text encoder in OpenCLIP's names, which are not read",
    ),
}


@pytest.mark.parametrize(("content", "sentence"), NOT_FOLDED.values(), ids=NOT_FOLDED)
def test_what_cannot_be_taken_over_is_refused_for_its_true_reason(tiny_model, tmp_path, content, sentence):
    save_file(content, tmp_path / "lora.safetensors")

    with pytest.raises(ValueError, match=sentence) as raised:
        edit_of(tmp_path / "lora.safetensors", tiny_model)
    assert str(tmp_path) in str(raised.value)


def test_pefts_other_methods_are_refused_by_name(tiny_model, tmp_path):
    path = peft(factors_of(tiny_model, *UNET_LAYERS), tmp_path, peft_type="LOHA")
    with pytest.raises(ValueError, match="holds LOHA, which is not read"):
        edit_of(path, tiny_model)
    (path / "adapter_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"settings of .* are damaged"):
        edit_of(path, tiny_model)


@torch.no_grad()
def test_spms_squared_gate_is_a_switch(tiny_model, tmp_path):
    expected = spm_file(tiny_model, tmp_path / "spm.safetensors")
    # A prompt that is about the concept in part.
    prompt = ["a church by gogh"]
    text, latents = tiny_model.encode(prompt), tiny_model.initial_latents([1])
    predictions = {}
    for merge in ("exact", "published"):
        eraser = Imported(path=tmp_path / "spm.safetensors", merge=merge)
        by_hand = Membranes(expected.up, expected.down, expected.targets, merge=merge)
        for edit in (eraser.erase(tiny_model, CONCEPT, Off(), seed=0).edit, Edit({}, {}, (by_hand,))):
            with edit.applied(tiny_model):
                found = tiny_model.predict(latents, 500, tiny_model.encode(prompt))
            assert torch.equal(predictions.setdefault(merge, found), found)

    assert not torch.equal(predictions["exact"], predictions["published"])
    assert not torch.equal(tiny_model.predict(latents, 500, text), predictions["published"])


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("variant", ["", "fp16"])
def test_split_weights_are_read_by_their_list(tiny_model, tmp_path, suffix, variant):
    changed = erased(tiny_model)
    unet = list(whole_unet(tiny_model, changed).items())
    stem, middle = "diffusion_pytorch_model", f".{variant}" if variant else ""
    weight_map = {}
    for number, part in enumerate((unet[::2], unet[1::2]), start=1):
        name = f"{stem}{middle}-0000{number}-of-00002.{suffix}"
        weight_map |= dict.fromkeys(dict(part), name)
        save_file(dict(part), tmp_path / name) if suffix == "safetensors" else torch.save(dict(part), tmp_path / name)
    (tmp_path / f"{stem}.{suffix}.index{middle}.json").write_text(json.dumps({"weight_map": weight_map}))

    assert_becomes(tiny_model, edit_of(tmp_path, tiny_model), changed)

    (tmp_path / f"{stem}{middle}-00002-of-00002.{suffix}").unlink()
    with pytest.raises(FileNotFoundError, match="whole or in all its parts"):
        edit_of(tmp_path, tiny_model)


def test_a_damaged_list_of_split_weights_is_told(tiny_model, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(ValueError, match=r"model.safetensors.index.json is no list of split weights"):
        edit_of(tmp_path, tiny_model)


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_a_pipeline_with_half_precision_files_alone_is_read(tiny_model, tmp_path, variant):
    changed = erased(tiny_model)
    export(tiny_model, Edit.from_weights(named_parameters(tiny_model), changed), tmp_path / "fmn")
    for file in list((tmp_path / "fmn").rglob("*model.safetensors")):
        save_file({k: v.half() for k, v in load_file(file).items()}, file.with_suffix(f".{variant}.safetensors"))
        file.unlink()

    edit = edit_of(tmp_path / "fmn", tiny_model)

    assert_becomes(tiny_model, edit, {name: value.half().float() for name, value in changed.items()})


def test_a_whole_clip_gives_its_text_half(tiny_model, tmp_path):
    changed = erased(tiny_model, scope="text_encoder")
    clip = {f"text_model.{inner(name)}": value for name, value in changed.items()}
    others = {
        "vision_model.x.weight": torch.ones(2),
        "visual_projection.weight": torch.ones(2),
        "logit_scale": torch.ones(()),
    }
    torch.save({**clip, **others}, tmp_path / "clip.pt")

    assert_becomes(tiny_model, edit_of(tmp_path / "clip.pt", tiny_model), changed)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665693806c1\nsize 3438167534\n"
STAND_INS = {
    "Git LFS": (LFS, "is a pointer of Git LFS and not the file itself; run `git lfs pull`"),
    "git-annex": (b"/annex/objects/MD5E-s12--0123.safetensors\n", "is a pointer of git-annex"),
    "a page": (b"\n<!DOCTYPE html>\n<html lang='en'>", "is a web page that was saved in the file's place"),
    "a page with a mark": (b"\xef\xbb\xbf<html>", "is a web page"),
    "a refusal": (b'{"error":"Repository not found"}', "is a server's error message"),
    "a refusal of the Hub": (b"Access to model stabilityai/x is restricted.", "is a server's error message"),
    "a refusal of a bucket": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "is a server's error message"),
}


@pytest.mark.parametrize("name", ["erased.safetensors", "erased.pt", "erased.bin"])
@pytest.mark.parametrize(("content", "sentence"), STAND_INS.values(), ids=STAND_INS)
def test_what_lies_in_the_place_of_a_checkpoint_is_called_what_it_is(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        read_checkpoint(tmp_path / name)


def test_a_pointer_in_a_folder_is_named(tiny_model, half_folder, tmp_path):
    shutil.copytree(half_folder, tmp_path / "m")
    (tmp_path / "m" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(LFS)
    with pytest.raises(ValueError, match=r"unet/diffusion_pytorch_model.safetensors is a pointer of Git LFS"):
        edit_of(tmp_path / "m", tiny_model)


def test_pickles_of_any_protocol_of_old_run_no_code(tiny_model, tmp_path):
    changed = erased(tiny_model)
    path = pickled(lambda model, changed: changed)(tiny_model, changed, tmp_path)
    torch.save({"state_dict": changed, "best": np.float32(1)}, path, _use_new_zipfile_serialization=False)
    assert_becomes(tiny_model, edit_of(path, tiny_model), changed)
