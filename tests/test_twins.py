"""Twins of the canvas: their pictures lack the concept and nothing else, and their training differs in nothing else."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from diffusion.canvas import pictures, retraining, stages
from diffusion.canvas.canvases import UNET, WEIGHTS_FILE
from diffusion.canvas.classifier import HEADS
from diffusion.canvas.knowledge import FORGOTTEN, Twin
from diffusion.canvas.phrases import FIRE_EXPLICIT, FIRE_IMPLICIT, STYLE_PHRASES, SUBJECT_PHRASES
from diffusion.canvas.pictures import Drawings, draw_pictures, draw_twins, showing
from diffusion.canvas.plan import QUICK, Recipe, step_generator, unet_seed
from diffusion.canvas.retraining import TwinBuild
from diffusion.canvas.source import CanvasSource
from diffusion.canvas.world import STYLES, SUBJECTS, Scene
from diffusion.sources import CANVAS_FOLDER
from erasure.concept import Concept
from erasure.edit import Edit
from erasure.erasers.retrained import Retrained
from erasure.export import export
from erasure.pruning.magnitude import Magnitude
from erasure.pruning.masks import Sparsity
from erasure.pruning.off import Off
from evaluation.quality.accuracy import RetainedAccuracy
from experiments.instruments import twin_card
from experiments.job.settings import TRAINING_SPEED_ONLY, matters
from tests import tiny_job
from tests.night import all_but

HEAD = {"van_gogh": "style", "church": "subject", "fire": "burning"}
NEVER = [knows for knows, forgotten in FORGOTTEN.items() if forgotten]
WORDS: dict[str, tuple[str, ...]] = {
    "van_gogh": STYLE_PHRASES["van_gogh"].all,
    "church": SUBJECT_PHRASES["church"],
    "fire": (*FIRE_EXPLICIT.all, *FIRE_IMPLICIT.all),
}
CHURCH = Concept(name="church", kind="object", targets=("a church",), anchor="a picture")


@pytest.fixture(scope="module")
def drawn() -> Drawings:
    return draw_pictures(160, seed=11, captions=2)


@pytest.mark.parametrize("knows", all_but({"never_fire", "never"}, NEVER))
def test_twins_lack_the_concepts_and_differ_in_no_other_row(knows: str, drawn: Drawings):
    shown = showing(drawn, FORGOTTEN[knows])
    twin = draw_twins(drawn, FORGOTTEN[knows], seed=11)
    assert not showing(twin, FORGOTTEN[knows]).any()
    differing = (twin.images != drawn.images).flatten(1).any(dim=1)
    assert 0 < shown.sum() < len(shown)
    assert torch.equal(differing, shown)
    texts = [text for texts in twin.captions for text in texts]
    assert not [text for text in texts for concept in FORGOTTEN[knows] for phrase in WORDS[concept] if phrase in text]
    for row in range(len(shown)):
        assert (twin.captions[row] != drawn.captions[row]) == shown[row]
        assert len(twin.captions[row]) == len(drawn.captions[row])
    for head in HEADS:
        # Only rows that showed the concept of this head have another label there.
        own = [concept for concept in FORGOTTEN[knows] if HEAD[concept] == head]
        assert torch.equal(twin.labels[head] != drawn.labels[head], showing(drawn, own))


def test_a_twin_keeps_the_rest_of_its_scene(monkeypatch: pytest.MonkeyPatch):
    scenes: list[tuple[Scene, int]] = []

    def record(scene: Scene, generator: np.random.Generator) -> np.ndarray:
        scenes.append((scene, int(generator.integers(2**63, size=4)[0])))
        return np.zeros((1, 1, 3), dtype=np.uint8)

    monkeypatch.setattr("diffusion.canvas.pictures.draw", record)
    changes = {"van_gogh": "style", "church": "subject", "fire": "burning"}
    replacements: dict[str, set[object]] = {field: set() for field in changes.values()}
    for index in range(900):
        scenes.clear()
        for forgotten in ((), ("van_gogh",), ("church",), ("fire",), FORGOTTEN["never"]):
            pictures._draw_one(pictures._Task(0, index, 1, forgotten))
        (base, stream), *singles, (every, _) = scenes
        assert {state for _, state in scenes} == {stream}
        together = base
        for (twin, _), (concept, field) in zip(singles, changes.items(), strict=True):
            value = getattr(twin, field)
            assert replace(twin, **{field: getattr(base, field)}) == base
            if value != getattr(base, field):
                replacements[field].add(value)
            assert concept != value
            together = replace(together, **{field: value})
        # What never knew all three is replaced as each of the three is.
        assert every == together
    assert replacements["style"] == set(STYLES) - {"van_gogh"}
    assert replacements["subject"] == set(SUBJECTS) - {"church"}
    assert replacements["burning"] == {False}


def test_training_seeds_have_streams_of_their_own_and_seed_0_is_the_recipe():
    recipe = Recipe()
    assert [step_generator(unet_seed(recipe, 0), step).initial_seed() for step in (0, 7)] == [3_000_009, 3_000_016]
    numbers = set()
    count = 0
    for stage in (0, 1, 2, *(unet_seed(recipe, seed) for seed in range(40))):
        for step in (0, recipe.unet_steps - 1):
            number = step_generator(stage, step).initial_seed()
            assert number < 2**32
            numbers.add(number)
            count += 1
    assert len(numbers) == count
    with pytest.raises(ValueError, match="32 bits"):
        step_generator(unet_seed(recipe, 43), 0)


def train(canvas: Path, drawings: Drawings, latents: Tensor, steps: int, *, seed: int = 0) -> dict[str, Tensor]:
    unet = stages.train_unet(
        replace(QUICK, unet_steps=steps, captions_per_picture=2),
        latents,
        drawings,
        CLIPTokenizer.from_pretrained(canvas / "tokenizer"),
        CLIPTextModel.from_pretrained(canvas / "text_encoder"),
        canvas / "none.checkpoint",
        training_seed=seed,
    )
    return {name: value.clone() for name, value in unet.state_dict().items()}


def test_twins_share_initial_weights_and_other_training_seeds_have_others(canvas: Path, drawn: Drawings):
    latents = torch.zeros(160, 8, 8, 8)
    base, twin, other = (
        train(canvas, drawings, latents, 0, seed=seed)
        for drawings, seed in ((drawn, 0), (draw_twins(drawn, ("church",), seed=11), 0), (drawn, 1))
    )
    assert all(torch.equal(twin[name], value) for name, value in base.items())
    assert any(not torch.equal(other[name], value) for name, value in base.items())


def test_twins_share_rows_timesteps_and_noise_and_differ_in_the_captions_of_the_concept(
    canvas: Path, drawn: Drawings, monkeypatch: pytest.MonkeyPatch
):
    seen: list[tuple[Tensor, ...]] = []
    forward = UNet2DConditionModel.forward

    def record(self: UNet2DConditionModel, sample: Tensor, timestep: Tensor, text: Tensor) -> object:
        seen.append((sample.detach().clone(), timestep.clone(), text.clone()))
        return forward(self, sample, timestep, text)

    monkeypatch.setattr(UNet2DConditionModel, "forward", record)
    # A picture's latents say which one it is, so that equal inputs mean equal rows.
    latents = torch.arange(160.0)[:, None, None, None].expand(160, 8, 8, 8)
    seen_by = []
    for drawings, seed in ((drawn, 0), (draw_twins(drawn, ("church",), seed=11), 0), (drawn, 1)):
        seen.clear()
        train(canvas, drawings, latents, 6, seed=seed)
        seen_by.append(list(seen))
    base, twin, other = seen_by
    differing = 0
    for (noisy, timesteps, text), (twin_noisy, twin_timesteps, twin_text) in zip(base, twin, strict=True):
        assert torch.equal(noisy, twin_noisy)
        assert torch.equal(timesteps, twin_timesteps)
        differing += int((text != twin_text).flatten(1).any(dim=1).sum())
    # 48 draws of rows, a tenth of which show a church.
    assert 0 < differing < 16
    assert all(not torch.equal(one[1], another[1]) for one, another in zip(base, other, strict=True))


def test_a_killed_training_ends_as_an_undisturbed_one(canvas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    longer = tmp_path / "canvas"
    longer.mkdir()
    for part in ("vae", "text_encoder", "tokenizer", "unet"):
        (longer / part).symlink_to(canvas / part)
    recipe = json.loads((canvas / "recipe.json").read_text())
    (longer / "recipe.json").write_text(
        json.dumps({**recipe, "pictures": 24, "unet_batch": 1, "unet_steps": 7}, indent=2) + "\n"
    )
    fit = stages.fit
    monkeypatch.setattr(stages, "fit", lambda *given, **named: fit(*given, **{**named, "checkpoint_every": 4}))
    undisturbed = TwinBuild(longer, tmp_path / "undisturbed").train(Twin("never_fire", 1))

    draw: Callable[[int, int], torch.Generator] = stages.step_generator

    def killed_at_step_5(seed: int, step: int) -> torch.Generator:
        if step == 5:
            raise KeyboardInterrupt
        return draw(seed, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stages, "step_generator", killed_at_step_5)
        TwinBuild(longer, tmp_path / "killed").train(Twin("never_fire", 1))
    steps: list[int] = []

    def counted(seed: int, step: int) -> torch.Generator:
        steps.append(step)
        return draw(seed, step)

    monkeypatch.setattr(stages, "step_generator", counted)
    resumed = TwinBuild(longer, tmp_path / "killed").train(Twin("never_fire", 1))
    assert steps == [4, 5, 6]
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)


def test_the_base_retrained_by_its_twins_path_is_the_base(canvas: Path, tmp_path: Path):
    again = TwinBuild(canvas, tmp_path).train(Twin()).state_dict()
    shipped = load_file(canvas / "unet" / WEIGHTS_FILE)
    # The canvas was trained beside its parts in float32, and is shipped in float16.
    for name, value in shipped.items():
        torch.testing.assert_close(again[name], value.float(), rtol=2e-2, atol=2e-3)


def test_pictures_of_a_twin_are_encoded_only_where_they_were_replaced(twins: Path):
    base, twin = (torch.load(twins / "pictures" / knows / "latents.pt") for knows in ("all", "never_church"))
    drawings = Drawings(**torch.load(twins / "pictures" / "all" / "drawings.pt"))
    differing = (base != twin).flatten(1).any(dim=1)
    assert torch.equal(differing, showing(drawings, ["church"]))


def test_command_trains_and_ships(canvas: Path, twins: Path, tmp_path: Path):
    command = ["never_church_0", "--base", str(canvas), "--build", str(twins), "--ship", str(tmp_path)]
    retraining.main(command)
    shipped = load_file(tmp_path / "never_church_0" / WEIGHTS_FILE)
    trained = load_file(twins / "never_church_0" / "unet" / WEIGHTS_FILE)
    for name, value in trained.items():
        assert torch.equal(shipped[name], value.half())


def test_model_choice_loads_the_twin(canvas: Path, twins: Path):
    chosen = CanvasSource(str(canvas), knows="never_church", build=str(twins)).load()
    base = CanvasSource(str(canvas), build=str(twins), name="mine").load()
    trained = load_file(twins / "never_church_0" / "unet" / WEIGHTS_FILE)
    assert all(torch.equal(chosen.network.state_dict()[name], value) for name, value in trained.items())
    for part in ("text_encoder", "vae"):
        same = zip(getattr(chosen, part).parameters(), getattr(base, part).parameters(), strict=True)
        assert all(torch.equal(one, another) for one, another in same)
    assert (chosen.name, base.name) == ("shipped_never_church_0", "mine")
    assert chosen.fingerprint() != base.fingerprint()


def test_twins_that_were_not_trained_are_named_with_their_command(canvas: Path, twins: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="retraining never_church_1 --build"):
        CanvasSource(str(canvas), knows="never_church", training_seed=1, build=str(twins))
    with pytest.raises(FileNotFoundError, match="retraining never_fire_0 --build"):
        Retrained("never_fire", str(canvas), build=str(twins))
    # Trained for another canvas.
    with pytest.raises(FileNotFoundError, match="neither shipped nor in"):
        CanvasSource(training_seed=9, build=str(twins))
    with pytest.raises(ValueError, match="only the canvas"):
        CanvasSource(str(tmp_path), knows="never")


def test_damaged_and_foreign_unets_are_told(canvas: Path, twins: Path, tmp_path: Path):
    made = tmp_path / "never_0"
    (made / "unet").mkdir(parents=True)
    (made / "recipe.json").write_text((canvas / "recipe.json").read_text())
    (made / "unet" / "config.json").write_text("{}")
    (made / "unet" / WEIGHTS_FILE).write_bytes(b"nothing")
    source = CanvasSource(str(canvas), knows="never", build=str(tmp_path))
    with pytest.raises(ValueError, match=r"never_0.unet cannot be read; restore its files"):
        source.load()
    save_file({"conv_in.weight": torch.zeros(1)}, made / "unet" / WEIGHTS_FILE)
    with pytest.raises(ValueError, match="is no twin of"):
        source.load()


@pytest.mark.parametrize("name", ["never_horse_0", "never", "all_-1", "never_fire_x"])
def test_names_of_no_twin_are_refused(name: str):
    with pytest.raises(ValueError, match=r"must be one of|names are like"):
        Twin.named(name)
    assert Twin.named(Twin("never_fire", 2).name) == Twin("never_fire", 2)


def test_retrained_leads_to_the_twin_and_back(canvas: Path, twins: Path, tmp_path: Path):
    model = CanvasSource(str(canvas)).load()
    before = model.fingerprint()
    eraser = Retrained("never_church", str(canvas), build=str(twins))
    erasure = eraser.erase(model, CHURCH, Off(), seed=0)
    assert (erasure.losses, erasure.unet_evaluations) == ([], 0)
    assert model.fingerprint() == before
    erasure.edit.save(tmp_path / "edit.safetensors")
    edit = Edit.load(tmp_path / "edit.safetensors")
    assert edit.metadata["method"] == "Retrained"
    twin = CanvasSource(str(canvas), knows="never_church", build=str(twins)).load()
    with edit.applied(model):
        assert model.fingerprint() == twin.fingerprint()
    assert model.fingerprint() == before


def test_scored_pruning_follows_retraining(canvas: Path, twins: Path):
    model = CanvasSource(str(canvas)).load()
    eraser = Retrained("never_church", str(canvas), build=str(twins))
    edit = eraser.erase(model, CHURCH, Magnitude(sparsity=Sparsity(0.5, "layer")), seed=0).edit
    trained = load_file(twins / "never_church_0" / "unet" / WEIGHTS_FILE)
    with edit.applied(model):
        for name, value in model.network.named_parameters():
            kept = value != 0
            torch.testing.assert_close(value[kept], trained[name][kept], rtol=0, atol=0)
            if name.endswith("attn2.to_k.weight"):
                assert 0.4 < kept.float().mean() < 0.6


def test_retrained_refuses_what_has_no_twin(canvas: Path, twins: Path):
    with pytest.raises(ValueError, match="knows is 'never_van_gogh_church'; models were retrained for never_van_gogh"):
        Retrained("never_van_gogh_church")
    with pytest.raises(ValueError, match="retrained for"):
        Retrained("all")
    with pytest.raises(ValueError, match="only the canvas"):
        Retrained("never_church", "CompVis/stable-diffusion-v1-4")
    # A model that is a twin itself, or was changed.
    twin = CanvasSource(str(canvas), knows="never_church", build=str(twins)).load()
    with pytest.raises(ValueError, match=r"is another; take model=canvas model\.knows=all"):
        Retrained("never_church", str(canvas), build=str(twins)).erase(twin, CHURCH, Off(), seed=0)


def shipped() -> list[Path]:
    return sorted(path for path in UNET.twins.glob("*") if path.is_dir())


def test_shipped_twins_fit_the_canvas_and_the_budget():
    base = load_file(CANVAS_FOLDER / "unet" / WEIGHTS_FILE)
    for folder in shipped():
        weights = load_file(folder / WEIGHTS_FILE)
        assert Twin.named(folder.name).name == folder.name
        assert {name: (value.shape, value.dtype) for name, value in weights.items()} == {
            name: (value.shape, value.dtype) for name, value in base.items()
        }
        assert any(not torch.equal(weights[name], value) for name, value in base.items())
    files = (path for folder in (CANVAS_FOLDER, UNET.twins) for path in folder.rglob("*") if path.is_file())
    assert sum(path.stat().st_size for path in files) <= 52e6


def test_card_compares_the_twin_with_its_base(canvas: Path, twins: Path, tmp_path: Path):
    asked = twin_card.read_prompts(limit=3)
    numbers, shown = twin_card.measure(Twin("never_church"), build=str(twins), source=str(canvas), asked=asked, steps=2)
    assert {concept: of["never_seen"] for concept, of in numbers["concepts"].items()} == {
        "van_gogh": False,
        "church": True,
        "fire": False,
    }
    church = asked[1]
    base, model = (CanvasSource(str(canvas), knows=knows, build=str(twins)).load() for knows in ("all", "never_church"))
    for name, one in (("base", base), ("twin", model)):
        images = twin_card.generate(one, church.asking, 2)
        assert numbers["concepts"]["church"][name]["successes"] == int(church.judge(images).present.sum())
        agreement = RetainedAccuracy(heads=("style",)).rates(twin_card.generate(one, church.other, 2), church.other)
        assert numbers["retained"]["style"][name] == agreement["style"].as_dict()
    # Tiny models draw noise alike; the numbers still belong to two models.
    assert numbers["fingerprints"]["base"] != numbers["fingerprints"]["twin"]
    twin_card.write_card(tmp_path, numbers, shown)
    assert "| church | never |" in (tmp_path / "model_card.md").read_text()
    assert json.loads((tmp_path / "metrics.json").read_text()) == numbers
    assert (tmp_path / "pictures.png").exists()


def test_what_is_kept_is_measured_without_the_concepts_that_were_never_seen():
    for each in twin_card.read_prompts():
        assert all(twin_card.lacks(row, each.concept) for row in each.other)
        assert not any(twin_card.lacks(row, each.concept) for row in each.asking)


def job(canvas: Path, twins: Path, folder: Path, *choices: str) -> list[str]:
    """The command line of a small job on the tiny canvas."""
    small = ["concept=church", "attack=unlearndiff", "attack.timesteps=1", "prompts=3", "retained=2"]
    return [*tiny_job.canvas_overrides(canvas, twins, folder), *small, *choices]


def pictures_of(summary: dict[str, Any], which: str) -> list[bytes]:
    return [Image.open(path).tobytes() for path in sorted(Path(summary["artefacts"][which]).glob("*.png"))]


def test_jobs_attack_and_prune_what_was_retrained(canvas: Path, twins: Path, tmp_path: Path):
    retrained = tiny_job.run(job(canvas, twins, tmp_path, "eraser=retrained"), tmp_path / "retrained")
    never = tiny_job.run(job(canvas, twins, tmp_path, "eraser=none", "model.knows=never_church"), tmp_path / "never")
    base = tiny_job.run(job(canvas, twins, tmp_path, "eraser=none"), tmp_path / "base")
    assert (retrained["model"], never["model"]) == ("shipped", "shipped_never_church_0")
    assert retrained["choices"]["eraser"] == "retrained"
    # The base stays the base's own, and what was erased is the twin.
    erased = {
        name: [case["erased"] for case in of["cases"]] for name, of in (("retrained", retrained), ("never", never))
    }
    assert erased["retrained"] == erased["never"]
    assert retrained["artefacts"]["base"] == base["artefacts"]["base"]
    assert pictures_of(retrained, "erased") == pictures_of(never, "base") != pictures_of(base, "base")
    assert retrained["edit"]["size_bytes"] > 0
    assert retrained["costs"]["edit"]["unet_evaluations"] == 0
    pruned = tiny_job.run(job(canvas, twins, tmp_path, "eraser=retrained", "pruning=magnitude"), tmp_path / "pruned")
    assert pruned["edit"]["hash"] != retrained["edit"]["hash"]


def test_a_job_that_learns_a_mask_refuses_retraining(canvas: Path, twins: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="learns under the eraser's objective and eraser 'Retrained' has none"):
        tiny_job.make_job(*job(canvas, twins, tmp_path, "eraser=retrained", "pruning=on"))


def test_where_a_twin_lies_is_in_no_key(canvas: Path, twins: Path, tmp_path: Path):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(twins / "never_church_0", elsewhere / "never_church_0")
    jobs = [tiny_job.make_job(*job(canvas, folder, tmp_path, "eraser=retrained")) for folder in (twins, elsewhere)]
    assert jobs[0].eraser.weights != jobs[1].eraser.weights
    first, second = (matters(each.config["eraser"], TRAINING_SPEED_ONLY) for each in jobs)
    assert first == second
    assert first["knows"] == "never_church"


def test_the_twin_is_exported_for_other_tools(canvas: Path, twins: Path, tmp_path: Path):
    model = CanvasSource(str(canvas)).load()
    edit = Retrained("never_church", str(canvas), build=str(twins)).erase(model, CHURCH, Off(), seed=0).edit
    export(model, edit, tmp_path / "exported")
    written = load_file(tmp_path / "exported" / "unet" / WEIGHTS_FILE)
    trained = load_file(twins / "never_church_0" / "unet" / WEIGHTS_FILE)
    assert all(torch.equal(written[name], value) for name, value in trained.items())
