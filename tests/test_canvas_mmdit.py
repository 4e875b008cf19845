"""The canvas's transformer: it learns, is shipped as any Stable Diffusion 3, and has twins as the U-Net has."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusion.canvas import canvases, mmdit_recipe, retraining
from diffusion.canvas.canvases import MMDIT, UNET, WEIGHTS_FILE, canvas_of
from diffusion.canvas.knowledge import Twin
from diffusion.canvas.mmdit import TransformerRecipe, assemble, read_captions, text_half, train_transformer
from diffusion.canvas.mmdit_recipe import QUICK_MMDIT, MMDiTBuild, MMDiTRecipe
from diffusion.canvas.pictures import Drawings, draw_pictures
from diffusion.canvas.retraining import TwinBuild
from diffusion.canvas.source import CanvasSource
from diffusion.loading import ModelSource
from erasure.concept import Concept
from erasure.edit import Edit
from erasure.erasers.retrained import Retrained
from erasure.export import export
from erasure.pruning.off import Off
from experiments.instruments import canvas_card, twin_card
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


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS_FILE)


def test_the_command_trains_stages_and_ships_them_when_they_are_finished(
    canvas: Path, mmdit_canvas: Path, tmp_path: Path
) -> None:
    command = ["--quick", "--base", str(canvas), "--build", str(tmp_path / "build")]
    mmdit_recipe.main([*command, "--stages", "clip", "vae"])
    with pytest.raises(FileNotFoundError, match=r"The stage transformer is not finished in .*--stages transformer"):
        MMDiTBuild(QUICK_MMDIT, tmp_path / "build", canvas).ship(tmp_path / "shipped")
    mmdit_recipe.main([*command, "--ship", str(tmp_path / "shipped")])
    for part in ("transformer", "vae"):
        again, before = weights_in(tmp_path / "shipped" / part), weights_in(mmdit_canvas / part)
        assert {value.dtype for value in again.values()} == {torch.float16}
        for name, value in before.items():
            torch.testing.assert_close(again[name], value, rtol=2e-2, atol=2e-3)
    assert json.loads((tmp_path / "shipped" / "recipe.json").read_text())["transformer"]["width"] == 32


def test_training_seed_0_is_the_recipe_and_others_have_first_weights_and_draws_of_their_own(
    drawings: Drawings, latents: torch.Tensor, tokenizer: CLIPTokenizer, encoders: list
) -> None:
    def weights(steps: int, **seed: int) -> torch.Tensor:
        recipe = replace(RECIPE, steps=steps)
        trained = train_transformer(recipe, latents, drawings, tokenizer, encoders, None, **seed)
        return torch.cat([value.flatten() for value in trained.parameters()])

    for steps in (0, 2):
        assert torch.equal(weights(steps), weights(steps, training_seed=0))
        assert not torch.equal(weights(steps), weights(steps, training_seed=1))


def test_the_base_retrained_by_its_twins_path_is_the_base(mmdit_canvas: Path, tmp_path: Path) -> None:
    again = TwinBuild(mmdit_canvas, tmp_path).train(Twin()).state_dict()
    # It was trained beside its parts in float32, and is shipped in float16.
    for name, value in weights_in(mmdit_canvas / "transformer").items():
        torch.testing.assert_close(again[name], value.float(), rtol=2e-2, atol=2e-3)


def test_choosing_a_twin_loads_its_transformer_and_the_rest_of_the_canvas(
    mmdit_canvas: Path, mmdit_twins: Path
) -> None:
    base = CanvasSource.as_measured(str(mmdit_canvas), build=str(mmdit_twins)).load()
    twin = CanvasSource.as_measured(str(mmdit_canvas), knows="never_church", build=str(mmdit_twins)).load()
    assert (base.name, twin.name) == ("shipped", "shipped_never_church_0")
    trained = weights_in(mmdit_twins / "never_church_0" / "transformer")
    parameters = dict(twin.network.named_parameters())
    assert all(torch.equal(value, trained[name]) for name, value in parameters.items())
    assert all(torch.equal(one, other) for one, other in zip(base.vae.parameters(), twin.vae.parameters(), strict=True))
    assert torch.equal(base.encode(["a church"]), twin.encode(["a church"]))
    assert base.fingerprint() != twin.fingerprint()


def test_retrained_leads_to_the_twin_and_back_and_is_exported(
    mmdit_canvas: Path, mmdit_twins: Path, tmp_path: Path
) -> None:
    source, build = str(mmdit_canvas), str(mmdit_twins)
    base = CanvasSource.as_measured(source).load()
    twin = CanvasSource.as_measured(source, knows="never_church", build=build).load()
    before, concept = base.fingerprint(), Concept(name="church", kind="object", targets=("a church",), anchor="a house")
    eraser = Retrained("never_church", source, build=build)
    eraser.erase(base, concept, Off(), seed=0).edit.save(tmp_path / "edit.safetensors")
    edit = Edit.load(tmp_path / "edit.safetensors")
    # Its table of positions is not trained: it is that of the base, which is shipped in half precision.
    assert edit.entries.keys() <= dict(base.network.named_parameters()).keys()
    with edit.applied(base):
        assert base.fingerprint() == twin.fingerprint()
    assert base.fingerprint() == before
    export(base, edit, tmp_path / "exported")
    written, trained = (
        weights_in(folder / "transformer") for folder in (tmp_path / "exported", mmdit_twins / "never_church_0")
    )
    assert all(torch.equal(written[name], trained[name]) for name in dict(base.network.named_parameters()))
    with pytest.raises(ValueError, match=r"is another; take model=canvas_mmdit model\.knows=all"):
        eraser.erase(twin, concept, Off(), seed=0)


def test_a_folder_is_the_canvas_whose_network_it_has(canvas: Path, mmdit_canvas: Path) -> None:
    assert [canvas_of(str(folder)) for folder in (canvas, mmdit_canvas)] == [UNET, MMDIT]
    assert [canvas_of(name) for name in ("canvas", "canvas_mmdit")] == [UNET, MMDIT]


def test_the_twins_of_one_canvas_are_none_of_the_other(canvas: Path, twins: Path, mmdit_canvas: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"retraining never_church_0 --build {twins} --base {mmdit_canvas}`"):
        CanvasSource(str(mmdit_canvas), knows="never_church", build=str(twins))


def test_what_is_not_there_is_named_with_the_command_that_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = replace(MMDIT, weights=tmp_path / "none")
    monkeypatch.setattr(canvases, "CANVASES", {"canvas": UNET, "canvas_mmdit": nowhere})
    sentence = "The weights of canvas_mmdit are not in .*none; make them with `make canvas-mmdit`"
    with pytest.raises(FileNotFoundError, match=sentence):
        CanvasSource("canvas_mmdit", scheduler="flow_euler").load()
    with pytest.raises(FileNotFoundError, match=sentence):
        Retrained("never_fire", "canvas_mmdit")


def test_twins_are_shipped_in_half_precision(mmdit_canvas: Path, mmdit_twins: Path, tmp_path: Path) -> None:
    where = ["--base", str(mmdit_canvas), "--build", str(mmdit_twins), "--ship", str(tmp_path)]
    retraining.main(["never_church_0", *where])
    trained = weights_in(mmdit_twins / "never_church_0" / "transformer")
    shipped = weights_in(tmp_path / "never_church_0")
    assert all(torch.equal(shipped[name], value.half()) for name, value in trained.items())
    with pytest.raises(FileNotFoundError, match=rf"never_fire_0 is not finished in .* --base {mmdit_canvas}`"):
        retraining.main(["never_fire_0", *where])


def test_the_card_says_what_it_is_and_measures_it_with_the_canvass_judge(mmdit_canvas: Path, tmp_path: Path) -> None:
    build = mmdit_canvas.parent / "build"
    metrics = canvas_card.measure(mmdit_canvas, tmp_path, pictures=2, drawn=40, build=build)
    model = CanvasSource.as_measured(str(mmdit_canvas)).load()
    assert (metrics["canvas"], metrics["fingerprint"]) == ("canvas_mmdit", model.fingerprint())
    assert metrics["parts"].keys() == {"transformer", "vae", "text_encoder", "text_encoder_2"}
    assert {part for part, of in metrics["parts"].items() if "training_seconds" in of} == {"transformer", "vae"}
    card = canvas_card.render(metrics)
    assert "# The canvas's transformer" in card
    assert "20 Euler steps, guidance 5" in card
    assert f"PSNR {metrics['vae']['psnr']['mean']:.2f}" in card
    # The judge is the shipped canvas's, and knows its own pictures.
    assert metrics["judge"]["drawn"]["style"]["successes"] >= 38


def test_the_twins_card_names_the_network_and_how_it_is_chosen(
    mmdit_canvas: Path, mmdit_twins: Path, tmp_path: Path
) -> None:
    asked = twin_card.read_prompts(limit=1)
    source, build = str(mmdit_canvas), str(mmdit_twins)
    numbers, shown = twin_card.measure(Twin("never_church"), build=build, source=source, asked=asked, steps=2)
    assert shown.shape == (6, 3, 32, 32)
    card = twin_card.render(numbers)
    assert "The transformer of canvas_mmdit that was never shown church" in card
    assert "`model=canvas_mmdit model.knows=never_church model.training_seed=0`" in card
    assert "2 Euler steps" in card


@pytest.mark.skipif(not MMDIT.weights.is_dir(), reason="its weights are not shipped yet: make canvas-mmdit")
def test_shipped_weights_were_made_by_this_recipe_and_fit_the_budget() -> None:
    recipe = MMDiTRecipe()
    recorded = json.loads((MMDIT.weights / "recipe.json").read_text())
    assert recorded == json.loads(json.dumps(asdict(recipe)))
    shipped = weights_in(MMDIT.weights / "transformer")
    assert {value.dtype for value in shipped.values()} == {torch.float16}
    files = (path for folder in (MMDIT.weights, MMDIT.twins) for path in folder.rglob("*") if path.is_file())
    assert sum(path.stat().st_size for path in files) <= 40e6
    for folder in sorted(path for path in MMDIT.twins.glob("*") if path.is_dir()):
        twin = weights_in(folder)
        assert Twin.named(folder.name).name == folder.name
        assert {name: (value.shape, value.dtype) for name, value in twin.items()} == {
            name: (value.shape, value.dtype) for name, value in shipped.items()
        }
        assert any(not torch.equal(twin[name], value) for name, value in shipped.items())
