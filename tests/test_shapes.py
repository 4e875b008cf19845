"""Nothing that erases or attacks knows the sizes of Stable Diffusion, or of the tiny model of the other tests."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from hydra.utils import instantiate
from transformers import CLIPTextModel, CLIPTokenizer

from attacks.protocols import is_given_original
from diffusion.canvas.plan import make_scheduler
from diffusion.canvas.tiny import tiny_clip_config
from diffusion.model import TextToImage
from diffusion.sampling import Sampling
from erasure.edit import Edit
from erasure.pruning.off import Off
from tests.attack_cases import make_cases
from tests.judges import one_in
from tests.test_sdxl import CONCEPT, PROMPTS, composed, in_the_repository
from tests.tiny_job import CONFIG_FOLDER

__all__ = ["in_the_repository"]

TOKENS, WIDTH, CHANNELS, FACTOR, LATENTS = 31, 48, 16, 8, (6, 10)
"""None of them Stable Diffusion's but the factor, which is not the tiny model's; pictures are not square."""


QUICK = ("esd", "ac", "uce", "spm", "on", "wanda", "unlearndiff", "p4d", "ringabell", "embedding")
"""What the default set tries; the others are slow tests."""


def methods(group: str, *but: str) -> list[Any]:
    """Choices of a group without those that are other numbers for the same class, or need files."""
    names = sorted(path.stem for path in (CONFIG_FOLDER / group).glob("*.yaml"))
    names = [name for name in names if name not in but]
    return [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in names]


@pytest.fixture
def model(tokenizer_folder: Path) -> TextToImage:
    """A model of other sizes everywhere, which predicts velocity."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder, model_max_length=TOKENS)
    text_encoder = CLIPTextModel(tiny_clip_config(tokenizer, WIDTH, intermediate_size=64))
    unet = UNet2DConditionModel(
        sample_size=LATENTS,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
    )
    scheduler = make_scheduler()
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=type(scheduler).from_config({**scheduler.config, "prediction_type": "v_prediction"}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return TextToImage(pipeline, name="odd")


def test_sizes_are_those_of_the_parts(model: TextToImage) -> None:
    assert model.latent_shape == (CHANNELS, *LATENTS)
    assert model.image_size == (LATENTS[0] * FACTOR, LATENTS[1] * FACTOR)
    assert model.encode(PROMPTS).shape == (len(PROMPTS), TOKENS, WIDTH)
    assert model.process.prediction_type == "v_prediction"
    pictures = model.generate(PROMPTS[:1], seeds=[1], steps=2, guidance=3.0)
    assert pictures.shape == (1, 3, *model.image_size)
    assert model.encode_images(pictures).shape == (1, *model.latent_shape)


@pytest.mark.parametrize("choice", methods("eraser", "imported", "retrained"))
def test_every_eraser_takes_other_sizes(
    choice: str, model: TextToImage, tmp_path: Path, in_the_repository: None
) -> None:
    eraser, concept = composed("eraser", choice, f"store={tmp_path}"), instantiate(CONCEPT, _convert_="all")
    before = model.fingerprint()
    plain = model.generate(PROMPTS[:1], seeds=[1], steps=2, guidance=3.0)
    edit = eraser.erase(model, concept, Off(), seed=0).edit
    assert bool(edit) == (choice != "none")
    edit.save(tmp_path / "edit.safetensors")
    with Edit.load(tmp_path / "edit.safetensors").applied(model):
        assert model.generate(PROMPTS[:1], seeds=[1], steps=2, guidance=3.0).shape == plain.shape
    assert model.fingerprint() == before


@pytest.mark.parametrize("choice", methods("pruning"))
def test_every_pruning_takes_other_sizes(choice: str, model: TextToImage, in_the_repository: None) -> None:
    concept = instantiate(CONCEPT, _convert_="all")
    # Learned masks start where the two steps can prune.
    learned = ["pruning.initial_score=0.01"] if choice in {"on", "hard_concrete"} else []
    pruning = composed("pruning", choice, *learned)
    assert composed("eraser", "esd").erase(model, concept, pruning, seed=0).edit


@pytest.mark.parametrize("choice", methods("attack", "transfer"))
def test_every_attack_takes_other_sizes(choice: str, model: TextToImage, in_the_repository: None) -> None:
    attack = composed("attack", choice, *(["attack.checks=[1]"] if choice == "relearn" else []))
    options = {"original": model} if is_given_original(attack) else {}
    cases = make_cases(model, ["a church"])
    outcomes = list(attack.run(model, cases, one_in(10**9), sampling=Sampling(steps=2, batch_size=2), **options))
    assert [outcome.case_number for outcome in outcomes] == [10]
    assert outcomes[0].image.shape == (3, *model.image_size)
