"""What is checked once the model is loaded, and before anything is trained."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import open_dict

from diffusion.model import TextToImage
from evaluation.quality.accuracy import RetainedAccuracy
from experiments import CONFIG_FOLDER
from experiments.command.composing import sweep_jobs
from experiments.command.errors import CommandError
from experiments.command.shorthands import spell_out
from experiments.job import checks
from experiments.job.checks import check_job, check_jobs, check_room, most_bytes
from experiments.job.stages import Stages
from tests.tiny_job import ErraticJudge, Float64Folder, make_job, overrides, run


@pytest.fixture(autouse=True)
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any) -> None:
        raise AssertionError("the job began")

    monkeypatch.setattr(Stages, "edit", forbidden)


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["attack.tokens=100"], "attack: 100 tokens cannot be inserted"),
        (["attack.timesteps=2000"], "attack: timesteps is 2000; the model has 1000"),
        (
            ["evaluator=canvas"],
            "evaluator.accuracy: Prompt 0 has the style None; retained accuracy needs a column style",
        ),
        (
            ["evaluator=canvas", "~evaluator.accuracy", "evaluator.fid.folder=/nope"],
            "evaluator.fid: /nope holds no canvas classifier",
        ),
        (
            ["evaluator=canvas", "~evaluator.accuracy", "evaluator.clip_score.folder=/nope"],
            "evaluator.clip_score: /nope holds no CLIP",
        ),
        (["judge=canvas", "judge.folder=/nope"], "judge: /nope holds no canvas classifier"),
    ],
)
def test_what_cannot_end_well_is_refused_before_it_begins(
    world: Path, tmp_path: Path, command: list[str], sentence: str
) -> None:
    base = overrides(world, tmp_path / "store")
    if any(part.startswith("judge=") for part in command):
        base = [part for part in base if "judge" not in part]
    if any(part.startswith("evaluator=") for part in command):
        base = [part for part in base if part != "evaluator=none"]
    with pytest.raises((ValueError, FileNotFoundError), match=f"^{sentence}") as error:
        run([*base, *command], tmp_path / "run")
    assert "\n" not in str(error.value)


def test_a_member_of_a_union_is_asked_too(world: Path, tmp_path: Path) -> None:
    base = [part for part in overrides(world, tmp_path / "store") if not part.startswith("attack.")]
    command = [*base, "attack=[seed_search,random]", "attack.members.random.tokens=100"]
    with pytest.raises(ValueError, match="100 tokens cannot be inserted"):
        run(command, tmp_path / "run")


def test_found_prompts_of_other_cases_are_refused_at_once(world: Path, tmp_path: Path) -> None:
    found = tmp_path / "prompts.csv"
    found.write_text("case_number,prompt,adversarial_prompt\n0,a church,x a church\n")
    base = [part for part in overrides(world, tmp_path / "store") if not part.startswith("attack.")]
    with pytest.raises(ValueError, match="has no case 1"):
        run([*base, "attack=transfer", f"attack.found={found}"], tmp_path / "run")


def test_a_job_that_is_in_order_spends_nothing_on_checks(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = make_job(*overrides(world, tmp_path / "store"))
    model = job.model.load()
    with caplog.at_level(logging.INFO):
        check_job(job, model)
    assert model.unet_evaluations == 0
    assert not caplog.messages
    assert list((tmp_path / "store").iterdir()) == []


def test_every_job_of_a_sweep_is_checked_with_each_model_and_judge_once(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, judged = [], []
    load, judge = Float64Folder.load, ErraticJudge.__call__
    monkeypatch.setattr(Float64Folder, "load", lambda self: loaded.append(self) or load(self))
    monkeypatch.setattr(ErraticJudge, "__call__", lambda self, images: judged.append(images) or judge(self, images))
    base = overrides(world, tmp_path / "store")
    jobs = [make_job(*base, *more) for more in ([], ["seed=1"], ["attack.tokens=2"])]
    check_jobs(jobs)
    assert (len(loaded), len(judged)) == (1, 1)
    with pytest.raises(ValueError, match="100 tokens"):
        check_jobs([*jobs, make_job(*base, "attack.tokens=100")])


def test_labels_of_every_retained_prompt_are_looked_at(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "retained.csv"
    lines = ["case_number,prompt,style,subject", "0,a church,van_gogh,church", "1,a tench,van_gogh,tench"]
    path.write_text("\n".join([*lines, "2,a dog,van_gogh,dog"]) + "\n")
    rows = make_job(*overrides(world, tmp_path), f"concept.retained_prompts={path}").retained
    RetainedAccuracy().check_labels(rows[:2])
    with pytest.raises(ValueError, match="Prompt 2 has the subject 'dog'"):
        RetainedAccuracy().check_labels(rows)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_store_that_may_not_be_written_is_one_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="cannot be written to: Permission denied; choose another"):
        check_room(tmp_path / "store", 0)


def test_a_store_that_is_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("")
    with pytest.raises(OSError, match=r"The store .*store cannot be written to: File exists; choose another"):
        check_room(tmp_path / "store", 0)


def test_a_disk_that_may_be_too_small_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: usage._replace(free=2**30))
    check_room(tmp_path, 2**30)
    assert not caplog.messages
    check_room(tmp_path, 3 * 2**30)
    assert "has 1.0 GiB of free space, and 3.0 GiB may be needed" in caplog.text


def test_the_estimate_of_bytes_covers_what_a_job_wrote(
    world: Path, tmp_path: Path, tiny_model: TextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    command = overrides(world, tmp_path / "store")
    run(command, tmp_path / "run")
    pictures = sum(max(path.stat().st_size, 4096) for path in (tmp_path / "store").rglob("*.png"))
    edits = sum(path.stat().st_size for path in (tmp_path / "store").rglob("edit.safetensors"))
    estimate = most_bytes(make_job(*command), Float64Folder(world / "model").load())
    assert pictures + edits <= estimate


@pytest.mark.parametrize(
    ("argument", "told", "end"),
    [
        ("pruning=true", "pruning=true", "pruning=off leaves it out."),
        ("pruning=off,null", "pruning=null", "pruning=off leaves it out."),
        ("model=null", "model=null", "tiny."),
        ("eraser={}", "eraser={}", "eraser=none leaves it out."),
        ("attack=", "attack=", "attack=none leaves it out."),
        ("attack=true", "attack=true", "attack=none leaves it out."),
        ("evaluator={ }", "evaluator={ }", "evaluator=none leaves it out."),
        ("judge=1", "judge=1", "style_top3."),
    ],
)
def test_what_is_no_choice_of_a_group_is_told_with_the_choices(argument: str, told: str, end: str) -> None:
    group = argument.partition("=")[0]
    with pytest.raises(CommandError) as error:
        spell_out([argument])
    assert str(error.value).startswith(f"{told} is no choice: {group} takes the name of one of its choices, ")
    assert str(error.value).endswith(end)


@pytest.mark.parametrize(
    "argument", ["pruning=on", "pruning=off,on", "attack=[seed_search,random]", "seed=1", "+experiment=table1"]
)
def test_choices_pass(argument: str) -> None:
    assert spell_out([argument])


def test_a_sweep_over_nothing_is_told() -> None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        config = compose("config", return_hydra_config=True)
        with open_dict(config):
            config.hydra.sweeper.params = {"seed": "range(0,0)"}
        with pytest.raises(CommandError, match=r"seed=range\(0,0\) has no values, so there is no job to run"):
            list(sweep_jobs(config, "config"))
