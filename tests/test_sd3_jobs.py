"""Whole jobs on a tiny Stable Diffusion 3 folder, and which methods say that they do not go with it."""

from pathlib import Path
from typing import Any

import pytest

from erasure.edit import Edit
from experiments.command.errors import CommandError
from tests.tiny_job import make_job, run, write_world
from tests.tiny_sd3 import T5_TOKENS, make_tiny_sd3


@pytest.fixture(scope="module")
def sd3_world(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd3")
    make_tiny_sd3(tokenizer_folder).save_pretrained(folder / "model")
    write_world(folder)
    return folder


def command(world: Path, store: Path, *more: str) -> list[str]:
    return [
        "model=folder",
        f"model.source={world / 'model'}",
        f"model.t5_tokens={T5_TOKENS}",
        "~judge",
        "+judge._target_=tests.tiny_job.ErraticJudge",
        f"concept.prompts={world / 'concept.csv'}",
        f"concept.retained_prompts={world / 'retained.csv'}",
        *("evaluator=none", "tracker=off", "transfer.seeds=0", f"store={store}", "prompts=3", "retained=2"),
        *("sampling.steps=2", "sampling.batch_size=3"),
        *more,
    ]


ESD = ("eraser=esd", "eraser.steps=3", "eraser.batch_size=2", "eraser.sampling_steps=3", "eraser.learning_rate=1e-3")
UNLEARNDIFF = ("attack=unlearndiff", "attack.timesteps=2", "attack.steps_per_timestep=2", "attack.batch_size=3")
P4D = ("attack=p4d", "attack.preset=mu_attack", "attack.checks=2", "attack.steps_per_check=2")


@pytest.mark.parametrize("method", [("pruning=off", *UNLEARNDIFF), ("pruning=magnitude", *P4D)], ids=["off", "pruned"])
def test_a_job_erases_attacks_and_judges(sd3_world: Path, tmp_path: Path, method: tuple[str, ...]) -> None:
    summary: dict[str, Any] = run(command(sd3_world, tmp_path / "store", *ESD, *method), tmp_path / "run")
    assert [len(summary["cases"]), summary["rates"]["attacked"]["n"]] == [3, 3]
    assert {"base", "edit", "erased", "attack"} <= summary["costs"].keys()
    edit = Edit.load(Path(summary["artefacts"]["edit"]) / "edit.safetensors")
    assert edit.entries
    assert all(".attn." in name for name in edit.entries)


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        *((f"eraser={name}", "needs cross-attention") for name in ("mace", "fmn", "receler")),
        *((f"eraser={name}", "needs one text encoder") for name in ("safree", "advunlearn")),
    ],
)
def test_methods_that_cannot_work_refuse_when_the_config_is_composed(
    sd3_world: Path, tmp_path: Path, choice: str, reason: str
) -> None:
    with pytest.raises(CommandError, match=rf"^{choice} {reason}.*family sd3\); choose eraser=esd, ac, salun"):
        make_job(*command(sd3_world, tmp_path, choice))


@pytest.mark.parametrize("model", ["sd3_medium", "sd35_medium", "sd35_large"])
def test_its_models_are_choices(model: str) -> None:
    job = make_job(f"model={model}", "tracker=off", "judge=canvas", "evaluator=none", "eraser=ac", "attack=none")
    assert (job.model.scheduler, job.model.t5) == ("flow_euler", False)
    assert job.eraser.detach_first_token is False
    assert job.settings.sampling.steps == 28


SETTINGS: dict[str, dict[str, Any]] = {
    # ESD's authors' code for FLUX, and a script beside it: every attention, or what they call strict.
    "model=flux_dev eraser=esd": {
        "scope": "attn",
        "steps": 1400,
        "learning_rate": 1e-4,
        "batch_size": 1,
        "sampling_steps": 28,
        "trajectory": "frozen",
        "trajectory_guidance": 3.5,
        "strength": 1.0,
    },
    "model=flux_dev eraser=esd eraser.preset=strict": {"scope": "attn_kv", "steps": 1400},
    "model=sd35_medium eraser=esd": {"scope": "attn", "steps": 1400, "trajectory_guidance": 3.0},
    "model=flux_schnell eraser=esd": {"sampling_steps": 4, "trajectory_guidance": 1.0, "learning_rate": 1e-4},
    # MCE's baseline.
    "model=flux_schnell eraser=ac": {
        "learning_rate": 1e-5,
        "scope": "xattn",
        "sampling_steps": 4,
        "image_guidance": 1.0,
        "detach_first_token": False,
    },
    # UCE's code for FLUX.
    "model=flux_dev eraser=uce": {"tokens": "last", "ridge": 0.5, "erase_scale": 1.0, "preserve_scale": 1.0},
    "model=sd3_medium eraser=uce": {"tokens": "last", "preserve_scale": 1.0},
    "model=flux_dev eraser=sld": {"warmup_steps": 6, "safety_scale": 1000.0},
    "model=flux_schnell eraser=sld": {"warmup_steps": 1},
    "model=sd3_medium eraser=salun": {"image_guidance": 7.0, "sampling_steps": 28},
    # What is published for Stable Diffusion stays as it was.
    "model=sd14 eraser=esd": {"scope": "xattn", "steps": 1000, "trajectory": "current", "trajectory_guidance": 3.0},
    "model=sd14 eraser=esd eraser.preset=strict": {"scope": "xattn_kv", "steps": 1000},
    "model=sd14 eraser=uce": {"tokens": "from_last", "preserve_scale": None},
    "model=sd14 eraser=sld": {"warmup_steps": 10},
}


@pytest.mark.parametrize("typed", SETTINGS)
def test_methods_have_the_numbers_that_their_authors_take_there(typed: str) -> None:
    eraser = make_job(*typed.split(), "judge=canvas", "evaluator=none", "attack=none").eraser
    assert {name: getattr(eraser, name) for name in SETTINGS[typed]} == SETTINGS[typed]


def test_a_distilled_model_is_drawn_in_its_four_steps() -> None:
    jobs = [
        make_job(f"model={name}", "judge=canvas", "evaluator=none", "attack=none")
        for name in ("flux_dev", "flux_schnell")
    ]
    assert [job.settings.sampling.steps for job in jobs] == [28, 4]
