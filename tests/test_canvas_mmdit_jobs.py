"""Jobs on the canvas's transformer: what composes, with which settings, and a whole one with its floor."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from diffusion.canvas import canvases
from diffusion.canvas.canvases import MMDIT, UNET
from erasure.edit import Edit
from experiments.command.early import check_early
from experiments.command.errors import CommandError
from experiments.command.shorthands import spell_out
from experiments.fit import FITTED
from experiments.job.store import read_json
from tests import tiny_job
from tests.night import all_but

REFUSED = {
    **{f"eraser={name}": "needs cross-attention" for name in ("mace", "fmn", "receler")},
    **{f"eraser={name}": "needs one text encoder" for name in ("safree", "advunlearn")},
}
"""Choices that do not go with it, and why."""

CHOICES = [
    f"{group}={path.stem}" for group in FITTED for path in sorted((tiny_job.CONFIG_FOLDER / group).glob("*.yaml"))
]


def command(canvas: Path, twins: Path, *more: str) -> list[str]:
    return ["model=canvas_mmdit", f"model.source={canvas}", f"model.build={twins}", "concept=church", *more]


@pytest.mark.parametrize("choice", all_but({*REFUSED, "eraser=retrained", "eraser=uce", "attack=pez"}, CHOICES))
def test_every_choice_composes_or_refuses_in_one_sentence(
    choice: str, mmdit_canvas: Path, mmdit_twins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_job.CONFIG_FOLDER.parent)
    torch.save({"weight": torch.ones(1)}, tmp_path / "erased.pt")
    (tmp_path / "found.csv").write_text("case_number,prompt,adversarial_prompt\n0,a church,a chapel\n")
    needed = {
        "eraser=imported": [f"eraser.path={tmp_path / 'erased.pt'}"],
        "attack=transfer": [f"attack.found={tmp_path / 'found.csv'}"],
    }
    typed = command(mmdit_canvas, mmdit_twins, choice, *needed.get(choice, []))
    if choice in REFUSED:
        with pytest.raises(CommandError, match=rf"^{choice} {REFUSED[choice]}.*\(family canvas_mmdit\); choose"):
            tiny_job.make_job(*typed)
        return
    group, _, name = choice.partition("=")
    assert tiny_job.make_job(*typed).choices[group] == name


SETTINGS: dict[str, dict[str, Any]] = {
    # Sizes and rates are the canvas's.
    "eraser=esd": {"scope": "xattn", "steps": 250, "learning_rate": 5e-4, "sampling_steps": 20, "trajectories": 96},
    "eraser=salun": {"image_guidance": 3.0, "sampling_steps": 20},
    "attack=unlearndiff": {"timesteps": 10, "learning_rate": 0.1, "readable": True},
    "attack=p4d": {"checks": 5, "pictures": 1},
    # What its architecture asks for is Stable Diffusion 3's.
    "eraser=uce": {"tokens": "last", "preserve_scale": 1.0},
    "eraser=ac": {"detach_first_token": False, "learning_rate": 2e-4},
    # A preset is what authors take on Stable Diffusion 3.
    "eraser=esd eraser.preset=paper": {"scope": "attn", "steps": 1400, "sampling_steps": 28},
}


@pytest.mark.parametrize("typed", SETTINGS)
def test_it_takes_the_settings_of_the_canvas_and_of_its_architecture(typed: str, mmdit_canvas: Path) -> None:
    group = typed.partition("=")[0]
    job = tiny_job.make_job(*command(mmdit_canvas, mmdit_canvas, *typed.split()))
    assert {name: getattr(getattr(job, group), name) for name in SETTINGS[typed]} == SETTINGS[typed]
    assert (job.settings.sampling.steps, job.settings.sampling.batch_size) == (20, 64)
    assert (job.model.scheduler, job.model.t5, job.model.t5_tokens) == ("flow_euler", False, 0)
    assert job.choices["judge"] == "canvas"


def test_both_canvases_have_one_world_of_concepts() -> None:
    assert "concept=church" in spell_out(["model=canvas,canvas_mmdit", "concept=church"])
    with pytest.raises(CommandError, match="concept=church is one concept on the canvas and another"):
        spell_out(["model=canvas_mmdit,sd3_medium", "concept=church"])


def test_weights_that_are_not_there_are_told_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = replace(MMDIT, weights=tmp_path / "none")
    monkeypatch.setattr(canvases, "CANVASES", {"canvas": UNET, "canvas_mmdit": nowhere})
    with initialize_config_dir(str(tiny_job.CONFIG_FOLDER), version_base="1.3"):
        configs = [compose("config", [f"model={name}"]) for name in ("canvas", "canvas_mmdit")]
    check_early(configs[0])
    with pytest.raises(
        FileNotFoundError, match=r"canvas_mmdit are not in .*none; make them with `make canvas-mmdit`\.$"
    ):
        check_early(configs[1])


def test_a_job_erases_attacks_and_finds_its_floor(mmdit_canvas: Path, mmdit_twins: Path, tmp_path: Path) -> None:
    small = ["concept=church", "prompts=2", "retained=2", "attack.timesteps=1", "attack.steps_per_timestep=1"]
    esd = [
        "eraser=esd",
        "eraser.steps=2",
        "eraser.batch_size=2",
        "eraser.trajectories=2",
        "eraser.sampling_steps=2",
        "pruning=off",
    ]
    base = ["model=canvas_mmdit", *tiny_job.canvas_overrides(mmdit_canvas, mmdit_twins, tmp_path), *small]
    summary = tiny_job.run([*base, *esd], tmp_path / "esd")
    edit = Edit.load(Path(summary["artefacts"]["edit"]) / "edit.safetensors")
    assert edit.entries
    assert all(".attn.add_" in name or ".attn.to_add_out" in name for name in edit.entries)
    assert [len(summary["cases"]), summary["rates"]["attacked"]["n"]] == [2, 2]
    assert summary["model"] == "shipped"
    block = summary["floor"]
    assert (block["knows"], block["control"]) == ("never_church", None)
    made = {name: read_json(tmp_path / "store" / "runs" / run / "summary.json") for name, run in block["runs"].items()}
    assert {name: run["choices"]["eraser"] for name, run in made.items()} == {"floor": "retrained", "ceiling": "none"}
    assert Path(made["floor"]["artefacts"]["base"]) == Path(summary["artefacts"]["base"])

    # What the floor's twin draws is what the twin draws that is chosen as the model.
    never = tiny_job.run([*base, "eraser=none", "model.knows=never_church", "floor=off"], tmp_path / "never")
    assert never["model"] == "shipped_never_church_0"
    assert [case["erased"] for case in never["cases"]] == [case["erased"] for case in made["floor"]["cases"]]
    images = [
        [Image.open(path).tobytes() for path in sorted(Path(run["artefacts"]["erased"]).glob("*.png"))]
        for run in (made["floor"], never)
    ]
    assert images[0] == images[1] != []
