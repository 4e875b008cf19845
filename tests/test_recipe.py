"""The canvas's recipe: it runs, it resumes, and the shipped weights are what it would make."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPTokenizer

from diffusion.canvas.classifier import CanvasClassifier
from diffusion.canvas.pictures import draw_pictures
from diffusion.canvas.plan import QUICK, Recipe, make_scheduler
from diffusion.canvas.recipe import STAGES, Build
from diffusion.canvas.vocabulary import train_tokenizer
from diffusion.canvas.world import Scene
from diffusion.sources import CANVAS_FOLDER


@pytest.fixture(scope="module")
def quick_build(canvas: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """A copy of what the tiny canvas was shipped from."""
    return Build(QUICK, shutil.copytree(canvas.parent / "build", tmp_path_factory.mktemp("recipe") / "build"))


def test_quick_recipe_ships_a_folder_that_diffusers_runs(quick_build: Build, tmp_path: Path):
    quick_build.ship(tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(["a red church"], num_inference_steps=2, output_type="np").images
    assert pictures.shape == (1, 32, 32, 3)
    assert {value.dtype for value in load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors").values()} == {
        torch.float16
    }
    clip = CLIPModel.from_pretrained(tmp_path / "clip")
    ids = pipeline.tokenizer(["a red church"], return_tensors="pt").input_ids
    torch.testing.assert_close(
        clip.text_model(ids).last_hidden_state, pipeline.text_encoder(ids).last_hidden_state, rtol=0, atol=0
    )


def test_finished_stages_are_read_back_not_trained_again(quick_build: Build):
    before = {stage: (quick_build.folder / stage / "seconds.txt").stat().st_mtime_ns for stage in STAGES}
    quick_build.run()
    assert before == {stage: (quick_build.folder / stage / "seconds.txt").stat().st_mtime_ns for stage in STAGES}


def test_same_recipe_makes_the_same_weights(quick_build: Build, tmp_path: Path):
    again = Build(QUICK, tmp_path)
    again.run(["clip"])
    first = load_file(quick_build.folder / "clip" / "model.safetensors")
    for name, value in load_file(tmp_path / "clip" / "model.safetensors").items():
        torch.testing.assert_close(value, first[name])


def test_folder_of_another_recipe_is_refused(quick_build: Build):
    with pytest.raises(ValueError, match="another recipe"):
        Build(replace(QUICK, seed=1), quick_build.folder)


def test_picture_depends_on_seed_and_index_alone():
    few, more = (draw_pictures(count, seed=3, captions=2) for count in (3, 5))
    assert torch.equal(few.images, more.images[:3])
    assert few.captions == more.captions[:3]
    assert not torch.equal(few.images, draw_pictures(3, seed=4, captions=2).images)


def test_shipped_weights_were_made_by_this_recipe():
    recorded = json.loads((CANVAS_FOLDER / "recipe.json").read_text())
    assert recorded == json.loads(json.dumps(asdict(Recipe())))


def test_shipped_shapes_agree_with_the_recipe():
    recipe = Recipe()
    pipeline = StableDiffusionPipeline.from_pretrained(CANVAS_FOLDER)
    assert tuple(pipeline.unet.config.block_out_channels) == recipe.unet_channels
    assert pipeline.unet.config.cross_attention_dim == recipe.text_width
    assert pipeline.unet.config.in_channels == pipeline.vae.config.latent_channels == recipe.latent_channels
    assert all("CrossAttn" in kind for kind in pipeline.unet.config.down_block_types)
    assert pipeline.text_encoder.config.num_hidden_layers == recipe.text_layers
    assert len(pipeline.tokenizer) == pipeline.text_encoder.config.vocab_size >= 800
    assert CanvasClassifier.from_pretrained(CANVAS_FOLDER / "classifier").width == recipe.classifier_width
    shipped, made = pipeline.scheduler.config, make_scheduler().config
    for field in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "prediction_type"):
        assert shipped[field] == made[field]


@pytest.mark.slow
def test_shipped_vocabulary_is_the_one_the_captions_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def draw_nothing(_: Scene, generator: np.random.Generator) -> np.ndarray:
        generator.integers(2**63, size=4)  # what drawing any scene takes
        return np.zeros((1, 1, 3), dtype=np.uint8)

    monkeypatch.setattr("diffusion.canvas.pictures.draw", draw_nothing)
    recipe = Recipe()
    drawn = draw_pictures(recipe.pictures, seed=recipe.seed, captions=recipe.captions_per_picture)
    train_tokenizer((text for texts in drawn.captions for text in texts), tmp_path, size=recipe.vocabulary)
    shipped = CLIPTokenizer.from_pretrained(CANVAS_FOLDER / "tokenizer")
    assert shipped.get_vocab() == CLIPTokenizer.from_pretrained(tmp_path).get_vocab()


def test_shipped_files_fit_the_budget():
    assert sum(path.stat().st_size for path in CANVAS_FOLDER.rglob("*") if path.is_file()) <= 25e6
