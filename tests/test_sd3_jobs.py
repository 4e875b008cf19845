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
    assert all(".attn.add_" in name or ".attn.to_add_out." in name for name in edit.entries)


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
