"""Stable Diffusion XL: two text encoders behind the interface of one, with every eraser, pruning and attack."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from huggingface_hub import constants
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from attacks.protocols import is_given_original
from diffusion.canvas.plan import make_scheduler
from diffusion.canvas.tiny import tiny_clip_config, tiny_vae
from diffusion.denoisers.unet import UNetDenoiser
from diffusion.loading import load_model, model_source
from diffusion.loading.model_source import SDXL_KEY, _is_sdxl_file
from diffusion.model import TextToImage
from diffusion.parameters import TEXT_ENCODER_PREFIX
from diffusion.prompt_template import PromptTemplate
from diffusion.sampling import Sampling
from erasure.edit import Edit
from erasure.export import export
from erasure.pruning.off import Off
from experiments.fit import fitted
from tests.attack_cases import make_cases
from tests.conftest import make_tiny_pipeline
from tests.erasures import assert_comes_back_from_its_file
from tests.judges import one_in
from tests.networks import write_hub_cache
from tests.test_loading import unet_name, vae_name
from tests.tiny_job import CONFIG_FOLDER

PROMPTS = ["a church", "a red fish in the snow", ""]
TOKENS, WIDTH, POOLED = 24, 32 + 24, 24


def make_tiny_sdxl(tokenizer_folder: Path, *, zeros: bool = True) -> StableDiffusionXLPipeline:
    """8x8 latents, 16x16 pictures, text of 24 tokens and width 32 + 24, a pooled embedding of width 24."""
    torch.manual_seed(0)
    first = CLIPTokenizer.from_pretrained(tokenizer_folder)
    # As in SDXL, the second one pads with the vocabulary's first token.
    second = CLIPTokenizer.from_pretrained(tokenizer_folder, pad_token=first.convert_ids_to_tokens(0))
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        cross_attention_dim=WIDTH,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + POOLED,
    )
    own = {"num_hidden_layers": 3, "projection_dim": POOLED}
    return StableDiffusionXLPipeline(
        vae=tiny_vae(scaling_factor=0.13025, force_upcast=True),
        text_encoder=CLIPTextModel(tiny_clip_config(first, hidden_act="quick_gelu", **own)),
        text_encoder_2=CLIPTextModelWithProjection(tiny_clip_config(second, 24, hidden_act="gelu", **own)),
        tokenizer=first,
        tokenizer_2=second,
        unet=unet,
        scheduler=EulerDiscreteScheduler.from_config(make_scheduler().config, timestep_spacing="leading"),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )


@pytest.fixture(scope="module")
def folder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "xl"
    make_tiny_sdxl(tokenizer_folder).save_pretrained(path)
    return path


@pytest.fixture
def model(tokenizer_folder: Path) -> TextToImage:
    return TextToImage(make_tiny_sdxl(tokenizer_folder), name="tiny-xl", scheduler="euler")


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("zeros", [True, False])
def test_pictures_are_those_of_the_plain_pipeline(tokenizer_folder: Path, guidance: float, zeros: bool):
    pipeline = make_tiny_sdxl(tokenizer_folder, zeros=zeros)
    model = TextToImage(pipeline, scheduler="euler")
    prompts = PROMPTS[:2]
    ours = model.generate(prompts, seeds=[1, 2], steps=3, guidance=guidance)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompts,
        num_inference_steps=3,
        guidance_scale=guidance,
        latents=model.initial_latents([1, 2]),
        height=16,
        width=16,
        output_type="np",
    ).images
    difference = ours.permute(0, 2, 3, 1).numpy().astype(int) - (theirs * 255).round().astype(int)
    assert np.abs(difference).max() <= 1
    assert theirs.std() > 0.01
    # The two prompts are told apart, or any text would do.
    assert np.abs(np.diff(theirs, axis=0)).max() > 0.01


def test_text_is_both_hidden_states_and_a_row_of_the_pooled_embedding(tokenizer_folder: Path):
    pipeline = make_tiny_sdxl(tokenizer_folder, zeros=False)
    model = TextToImage(pipeline)
    text = model.encode(PROMPTS)
    tokens, _, pooled, _ = pipeline.encode_prompt(PROMPTS, device=torch.device("cpu"))
    assert text.shape == (3, TOKENS + 1, WIDTH) == (3, *model.text_shape)
    torch.testing.assert_close(text[:, :-1], tokens)
    torch.testing.assert_close(text[:, -1, :POOLED], pooled)
    assert not text[:, -1, POOLED:].any()
    torch.testing.assert_close(model.encode_tokens(PROMPTS), tokens)


def test_the_empty_prompt_is_zeros_where_the_pipeline_says_so(model: TextToImage):
    text = model.encode(PROMPTS)
    assert not text[2].any()
    assert text[:2, -1].any()


def test_token_embeddings_give_what_their_ids_do_whatever_the_padding(model: TextToImage):
    ids = model.tokenize(PROMPTS)
    ends = (ids == model.tokenizer.eos_token_id).int().argmax(1)
    embeddings = model.vocabulary[ids].requires_grad_()
    assert torch.equal(embeddings, model.token_embeddings(ids))
    text = model.encode_embeddings(embeddings, ends)
    torch.testing.assert_close(text, model.encode_ids(ids))
    (gradient,) = torch.autograd.grad(text[0, -1].square().sum(), embeddings)
    assert gradient[0, 1, 32:].any()
    # The pooled embedding is the second encoder's alone, and reads no padding.
    assert not gradient[0, :, :32].any()
    assert not gradient[0, int(ends[0]) + 1 :].any()


def test_an_inserted_token_reads_as_if_it_were_typed(model: TextToImage):
    [token] = model.tokenizer("church", add_special_tokens=False).input_ids[:1]
    template = PromptTemplate.insert(model, ["a red fish"], 1, "prefix_k")
    tokens = torch.tensor([[token]])
    torch.testing.assert_close(
        template.encode(model, model.token_embeddings(tokens)), model.encode_ids(template.fill(tokens))
    )


def test_the_pooled_embedding_and_the_size_reach_the_unet(tokenizer_folder: Path):
    small = TextToImage(make_tiny_sdxl(tokenizer_folder))
    text, latents = small.encode(PROMPTS[:1]), small.initial_latents([1])
    noise = small.predict(latents, 500, text)
    other = text.clone()
    other[:, -1, 0] += 1
    assert not torch.allclose(small.predict(latents, 500, other), noise)
    small.denoiser = UNetDenoiser(small.network, 2 * small.denoiser.pixels_per_latent)
    assert not torch.allclose(small.predict(latents, 500, text), noise)


def test_half_precision_leaves_the_vae_in_float32(folder: Path):
    model = load_model(str(folder), precision="fp16", device="cpu")
    assert (model.network.dtype, model.vae.dtype) == (torch.float16, torch.float32)
    assert model.decode(model.initial_latents([1])).shape == (1, 3, 16, 16)


def test_tokenizers_that_differ_are_refused(tokenizer_folder: Path):
    pipeline = make_tiny_sdxl(tokenizer_folder)
    pipeline.tokenizer_2.add_tokens(["zebra"])
    with pytest.raises(ValueError, match="tokenizers differ"):
        TextToImage(pipeline)


def test_the_fingerprint_covers_both_encoders(model: TextToImage):
    before = model.fingerprint()
    next(model.text_encoders.encoders[1].parameters()).data.add_(1)
    assert model.fingerprint() != before


def test_a_folder_gives_its_weights(folder: Path, model: TextToImage):
    assert load_model(str(folder), device="cpu").fingerprint() == model.fingerprint()


def test_a_cached_model_of_the_hub_is_known_by_its_index(
    folder: Path, model: TextToImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_hub_cache(tmp_path, "someone/xl", folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    from_pretrained = StableDiffusionXLPipeline.from_pretrained
    monkeypatch.setattr(
        StableDiffusionXLPipeline,
        "from_pretrained",
        lambda source, **options: from_pretrained(source, cache_dir=tmp_path, **options),
    )
    assert load_model("someone/xl", device="cpu").fingerprint() == model.fingerprint()


def test_an_index_without_the_first_encoder_is_refused(folder: Path, tmp_path: Path):
    index = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "tokenizer": [None, None]}))
    with pytest.raises(ValueError, match=r"no Stable Diffusion XL model: .* lacks tokenizer;"):
        load_model(str(tmp_path))


def test_a_single_file_is_known_by_its_second_encoder(tmp_path: Path):
    for name, keys in (("xl", [SDXL_KEY]), ("sd", ["cond_stage_model.transformer.x"])):
        save_file({key: torch.ones(1) for key in keys}, tmp_path / f"{name}.safetensors")
    assert _is_sdxl_file(tmp_path / "xl.safetensors")
    assert not _is_sdxl_file(tmp_path / "sd.safetensors")


def open_clip_weights(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """An encoder's weights named and laid out as OpenCLIP's, whose projections of one layer are one matrix."""
    renamed = [
        ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
        ("text_model.embeddings.token_embedding", "token_embedding"),
        ("text_model.final_layer_norm", "ln_final"),
        ("text_model.encoder.layers", "transformer.resblocks"),
        ("layer_norm", "ln_"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
        ("self_attn", "attn"),
    ]
    theirs = {}
    for name, value in weights.items():
        key = name
        for here, there in renamed:
            key = key.replace(here, there)
        if name == "text_projection.weight":
            theirs[prefix + "text_projection"] = value.T.contiguous()
        elif ".q_proj." in name:
            parts = [weights[name.replace("q_proj", side)] for side in ("q_proj", "k_proj", "v_proj")]
            theirs[prefix + key.replace("q_proj.", "in_proj_")] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            theirs[prefix + key] = value
    return theirs


def test_a_single_file_gives_the_folders_model(
    folder: Path, model: TextToImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(model_source, "hub_answers", lambda: False)
    weights = {}
    for part, name in (("unet", unet_name), ("vae", vae_name)):
        for key, value in load_file(folder / part / "diffusion_pytorch_model.safetensors").items():
            convolution = part == "vae" and "attentions" in key and "group_norm" not in key and key.endswith("weight")
            weights[
                name(key)
                .replace("add_embedding.linear_1", "label_emb.0.0")
                .replace("add_embedding.linear_2", "label_emb.0.2")
            ] = value[:, :, None, None] if convolution else value
    for key, value in load_file(folder / "text_encoder" / "model.safetensors").items():
        weights[f"conditioner.embedders.0.transformer.text_model.{key.removeprefix('text_model.')}"] = value
    second = load_file(folder / "text_encoder_2" / "model.safetensors")
    weights |= open_clip_weights(second, "conditioner.embedders.1.model.")
    path = tmp_path / "single.safetensors"
    save_file(weights, path)
    assert load_model(str(path), config=str(folder), device="cpu").fingerprint() == model.fingerprint()
    # Without a configuration it is asked for that of its own architecture.
    with pytest.raises(ValueError, match=r"point model\.config to a diffusers folder of the same architecture"):
        load_model(str(path), device="cpu")


def test_an_edit_exports_to_a_folder_of_its_own_pipeline(model: TextToImage, tmp_path: Path):
    name, weight = next(iter(model.network.named_parameters()))
    edit = Edit.from_weights({name: weight.detach()}, {name: weight.detach() + 1})
    export(model, edit, tmp_path / "out")
    with edit.applied(model):
        assert load_model(str(tmp_path / "out"), device="cpu").fingerprint() == model.fingerprint()


def test_the_unedited_model_beside_an_edited_one_reads_with_its_own_encoder(model: TextToImage):
    text = model.encode(PROMPTS)
    [name, weight] = next(iter(model.text_encoder.named_parameters()))
    name = f"{TEXT_ENCODER_PREFIX}{name}"
    with (edit := Edit.from_weights({name: weight.detach()}, {name: weight.detach() + 1})).applied(model):
        assert not torch.allclose(model.encode(PROMPTS), text)
        assert torch.equal(edit.unedited(model).encode(PROMPTS), text)


def test_one_encoder_has_the_text_it_had(tokenizer_folder: Path):
    pipeline = make_tiny_pipeline(tokenizer_folder)
    model = TextToImage(pipeline)
    assert len(model.text_encoders.encoders) == 1
    expected = pipeline.text_encoder(model.tokenize(PROMPTS)).last_hidden_state
    assert torch.equal(model.encode_tokens(PROMPTS), expected)


SMALL: dict[str, int] = {
    **dict.fromkeys(("steps", "images", "retain_images", "sampling_steps", "timesteps", "trajectories", "count"), 2),
    **dict.fromkeys(("retain_trajectories", "pictures", "tries", "tokens", "anchors", "rank", "generations"), 2),
    **dict.fromkeys(("inversion_steps", "search_steps", "iterations", "unrolled_steps", "batch_size"), 2),
    **dict.fromkeys(("most_steps", "retain_batch_size", "pictures_per_step", "inversion_batch_size", "first_steps"), 2),
    **dict.fromkeys(("attack_steps", "rounds", "warmup", "steps_per_timestep", "steps_per_check"), 1),
    **dict.fromkeys(("cycles", "epochs", "inversion_iterations", "every", "finetune_steps"), 1),
    **dict.fromkeys(("population", "substitutions", "top_k"), 4),
}
"""What stands for the numbers of a YAML file, so that it takes a step or two."""

CONCEPT = {
    "_target_": "erasure.concept.Concept",
    "name": "church",
    "kind": "object",
    "targets": ["a church", "a chapel"],
    "anchor": "a picture",
    "templates": ["{}", "a photo of {}"],
    "preserved": ["a fish", "a parachute"],
    "pairs": "prompts/canvas/church_pairs.csv",
}


def shrunk(node: Any) -> Any:
    """``node`` with the numbers of :data:`SMALL` in place of its own."""
    if isinstance(node, list):
        return [shrunk(value) for value in node]
    if not isinstance(node, dict):
        return node
    # The tiny U-Net has cross-attention at half its latents' size alone, and its vocabulary no such token.
    fixed = {"mask_reduction": 2, "initial_token": None, "checks": 1 if isinstance(node.get("checks"), int) else [1]}
    return {
        key: fixed[key]
        if key in fixed
        else min(value, SMALL[key])
        if key in SMALL and isinstance(value, int)
        else shrunk(value)
        for key, value in node.items()
    }


QUICK = {
    *("esd", "ac", "ac_embedding", "uce", "spm", "safree", "sld"),
    *("on", "wanda"),
    *("unlearndiff", "p4d", "ringabell", "gcg", "embedding"),
}
"""What the default set tries; the others are slow tests."""


def choices(group: str, *but: str) -> list[Any]:
    """The group's YAML files."""
    names = sorted(path.stem for path in (CONFIG_FOLDER / group).glob("*.yaml") if path.stem not in but)
    return [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in names]


@pytest.fixture
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(CONFIG_FOLDER.parent)
    yield


def composed(group: str, choice: str, *overrides: str) -> Any:
    """The object that the YAML file gives, made small."""
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        config: DictConfig = compose("config", ["concept=church", f"{group}={choice}", *overrides])
    return instantiate(shrunk(fitted(config)[group]), _convert_="all")


REFUSING = ("advunlearn", "safree")
"""How the names start of erasers that train, filter or read one text encoder."""


@pytest.mark.parametrize("choice", choices("eraser", "retrained"))
def test_every_eraser_works_or_refuses(choice: str, tokenizer_folder: Path, tmp_path: Path, in_the_repository: None):
    # Some published samplers are DDIM.
    model = TextToImage(make_tiny_sdxl(tokenizer_folder), name="tiny-xl", scheduler="ddim")
    overrides = [f"store={tmp_path}"]
    if choice == "imported":
        name, weight = next(iter(model.network.named_parameters()))
        save_file({f"unet.{name}": weight.detach() * 1.01}, tmp_path / "erased.safetensors")
        overrides.append(f"eraser.path={tmp_path / 'erased.safetensors'}")
    eraser, concept = composed("eraser", choice, *overrides), instantiate(CONCEPT, _convert_="all")
    before = model.fingerprint()
    if choice.startswith(REFUSING):
        with pytest.raises(ValueError, match="works with one text encoder and 'tiny-xl' has two"):
            eraser.erase(model, concept, Off(), seed=0)
        assert model.unet_evaluations == 0
        return
    edit = eraser.erase(model, concept, Off(), seed=0).edit
    assert bool(edit) == (choice != "none")
    assert_comes_back_from_its_file(edit, model, PROMPTS, tmp_path)
    assert model.fingerprint() == before


@pytest.mark.parametrize("choice", choices("pruning"))
def test_every_pruning_works(choice: str, model: TextToImage, in_the_repository: None):
    concept = instantiate(CONCEPT, _convert_="all")
    pruning = composed("pruning", choice)
    erasure = composed("eraser", "esd").erase(model, concept, pruning, seed=0)
    assert len(erasure.losses) >= 2
    assert erasure.edit or pruning.needs_objective


@pytest.mark.parametrize("choice", choices("attack"))
def test_every_attack_works(choice: str, model: TextToImage, tmp_path: Path, in_the_repository: None):
    overrides = []
    if choice == "transfer":
        (tmp_path / "found.csv").write_text("case_number,prompt,adversarial_prompt\n10,a church,a chapel\n")
        overrides.append(f"attack.found={tmp_path / 'found.csv'}")
    attack = composed("attack", choice, *overrides)
    cases = make_cases(model, ["a church"])
    options = {"original": model} if is_given_original(attack) else {}
    outcomes = list(attack.run(model, cases, one_in(10**9), sampling=Sampling(steps=2, batch_size=2), **options))
    assert [outcome.case_number for outcome in outcomes] == [10]
    assert outcomes[0].image.shape == (3, 16, 16)
