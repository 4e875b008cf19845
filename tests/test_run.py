"""The command line: help, choices, and one sentence for every mistake."""

import os
import pickle
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

from diffusion.sources import CANVAS_FOLDER
from tests.networks import write_hub_cache, write_resnet, write_vit
from tests.onnx_files import write_mean_classifier
from tests.tiny_job import CONFIG_FOLDER, make_job

ROOT = CONFIG_FOLDER.parent

MISTAKES = {
    "misspelt eraser": (["eraser=esdd"], "eraser=esdd is unknown; it must be one of", "did you mean esd?"),
    "misspelt attack": (["attack=unlerndiff"], "attack=unlerndiff is unknown", "unlearndiff"),
    "unknown concept": (["concept=horse"], "concept=horse is unknown", "van_gogh"),
    "unknown concept of a kind": (
        ["concept=artist/van_gog"],
        "concept=artist/van_gog is",
        "did you mean artist/van_gogh?",
    ),
    "unknown experiment": (["+experiment=tabl1"], "experiment=tabl1 is unknown", "table1"),
    "misspelt group": (["erasr=esd"], "erasr is unknown; the fields are", "did you mean eraser?"),
    "misspelt field": (["eraser.stepz=3"], "eraser.stepz is unknown; the fields are", "did you mean steps?"),
    "added field": (["+eraser.stepz=3"], "eraser.stepz is unknown; the fields are", "learning_rate"),
    "added top-level field": (["+prompt=3"], "prompt is unknown; the fields are", "did you mean prompts?"),
    "negative steps": (["eraser.steps=-3"], "eraser.steps is -3; it must be 1 or more."),
    "text for a number": (["eraser.steps=many"], "eraser.steps is 'many'; it must be an integer."),
    "fraction for an integer": (["prompts=2.5"], "prompts is 2.5; it must be an integer."),
    "no prompts": (["prompts=0"], "prompts is 0; it must be 1 or more."),
    "no sampling steps": (["sampling.steps=0"], "sampling.steps is 0; it must be 1 or more."),
    "value for a group of fields": (["sampling=3"], "sampling is 3; it must be a group of fields."),
    "unknown scope": (["eraser.scope=xatn"], "eraser.scope is 'xatn'; it must be one of", "'xattn'"),
    "impossible pair": (["eraser=none", "pruning=on"], "Pruning 'Learned'", "eraser=esd"),
    "impossible pair in a sweep": (["-m", "eraser=esd,none", "pruning=on"], "Pruning 'Learned'", "eraser=esd"),
    "last job of a sweep": (["-m", "seed=1,2,-3"], "seed is -3; it must be 0 or more."),
    "flag between overrides": (["seed=1", "-m", "seed=-1"], "seed is -1"),
    "sweep without -m": (["seed=1,2"], "seed=1,2 lists several values; add -m"),
    "override without a value": (["seed"], "'seed' is no override; write group=choice or field=value"),
    "open bracket": (["seed=[1"], "seed is '[1'; it must be an integer"),
    "unknown flag": (["--sweep"], "unrecognized arguments: --sweep"),
    "null for a group": (["eraser=null"], "takes the name of one of its choices"),
    "deleted group": (["~eraser"], "eraser is missing; choose one"),
    "missing model source": (["model=folder"], "model.source is missing; give it a value"),
    "missing prompts": (["concept.prompts=nope.csv"], "concept.prompts is nope.csv; it must be a CSV file"),
    "no list of prompts": (["prompt_set=list"], "prompt_set.source.path is missing; give it a value"),
    "missing list of prompts": (
        ["prompt_set=list", "prompt_set.source.path=no.txt"],
        "prompt_set.source.path is no.txt; it must be a CSV file",
    ),
    "prompt set out of reach": (
        [
            "prompt_set=unlearndiffatk",
            "prompt_set.source.url=http://127.0.0.1:9/x.csv",
            "prompt_set.source.cache=/nowhere",
        ],
        "http://127.0.0.1:9/x.csv cannot be used: ",
        "put it at /nowhere/9d0b141b6674-x.csv",
    ),
    "interpolation": (["prompts=${nope}"], "prompts cannot be resolved: Interpolation key 'nope' not found"),
    "prompt set of another concept": (
        ["prompt_set=unlearndiffatk", "concept=fire"],
        "prompt_set.source.url cannot be resolved: concept.name is 'fire'; it must be one of nudity",
    ),
    "misspelt column": (["prompt_set.columns.prompts=text"], "columns.prompts is unknown", "did you mean prompt?"),
    "missing column": (["prompt_set.columns.prompt=text"], "van_gogh.csv lacks the columns text; those that it has"),
    "condition of another kind": (
        ["prompt_set.where=[{column: style, test: above, value: neon}]"],
        "prompt_set.where.0: value is 'neon'; for above it must be a number",
    ),
    "misspelt rule for broken rows": (["prompt_set.broken_rows=drop"], "it must be one of 'refuse', 'skip'"),
    "dangling interpolation": (["seed=${nothing}"], "nothing"),
    "wrong class": (["eraser._target_=erasure.nothing.Class"], "eraser", "cannot be imported: nothing is not in"),
    "unknown kind": (["concept.kind=poem"], "concept.kind is 'poem'; it must be one of style, object, unsafe."),
    "unknown attack in a list": (["attack=[unlearndiff,randon]"], "attack=randon is unknown", "did you mean random?"),
    "empty list of attacks": (["attack=[]"], "attack=[] lacks a name; write attack=[unlearndiff,random]"),
    "nested list of attacks": (["attack=[[none],random]"], "attack=[[none],random] is no list of attacks"),
    "open list of attacks": (["attack=[none,random"], "attack=[none,random is no list of attacks"),
    "attack twice in a list": (["attack=[random,none,random]"], "names random twice"),
    "lists of attacks without -m": (["attack=none,[random,none]"], "lists several values; add -m"),
    "last list of a sweep": (["-m", "attack=none,[random,randon]"], "attack=randon is unknown"),
    "field of a list's member": (["attack=[none,random]", "attack.members.random.trie=3"], "trie is unknown", "tries"),
    "field of no member": (["attack=[none,random]", "attack.tries=3"], "attack.tries is unknown", "members"),
    "no run to transfer": (["attack=transfer"], "attack.found is missing; give it a value"),
    "missing run": (["transfer=nowhere"], "found is 'nowhere', which leads to no file; name a run's folder"),
    "unknown run": (["transfer=0123456789abcdef"], "store/runs/0123456789abcdef', which leads to no file"),
    "missing wordings": (["attack=paraphrase", "attack.wordings=my.csv"], "wordings is 'my.csv', which is no file"),
    "concept without wordings": (["concept=van_gogh_church", "attack=paraphrase"], "van_gogh_church.csv', which is no"),
    "misspelt order": (["attack=paraphrase", "attack.order=random"], "attack.order is 'random'; it must be one of"),
    "unknown judge label": (["judge.label=monet"], "label is 'monet'", "van_gogh"),
    "unknown judge": (["judge=nudnet"], "judge=nudnet is unknown", "did you mean nudenet?"),
    "unknown body part": (["judge=nudenet", "judge.labels=[BREAST]"], "judge: labels has 'BREAST'; NudeNet 3 knows"),
    "no artist classifier": (["judge=style"], "judge.network: it is null; give the folder of a classifier of artists"),
    "no old classifier": (
        ["judge=nudenet_v2"],
        "it is 'checkpoints/classifier_model.onnx', which is no file; download",
    ),
    "no tuned prompts": (["judge=q16"], "judge.prompts: it is 'checkpoints/prompts.p', which is no file; download"),
    "no CLIP": (["judge=clip_zeroshot", "judge.folder=nobody/clip"], "run `hf download nobody/clip --include"),
}


def complain(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> str:
    """Run the command in this process as ``python run.py`` would; returns its only sentence."""
    outputs = folder / "outputs"
    quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none"]
    folders = [f"hydra.run.dir={outputs}", f"hydra.sweep.dir={outputs}", f"store={folder / 'store'}"]
    own = {part.partition("=")[0] for part in command}
    defaults = [part for part in [*quiet, *folders, "tracker=off"] if part.partition("=")[0] not in own]
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["run.py", *command, *defaults])
    monkeypatch.chdir(ROOT)
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / "run.py"), run_name="__main__")
    # The interpreter prints a text that is given as exit status, and exits with 1.
    assert isinstance(exit_.value.code, str)
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "\n" not in exit_.value.code
    return exit_.value.code


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(
    mistake: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command, *parts = MISTAKES[mistake]
    monkeypatch.setattr("experiments.command.launch.run_job", lambda *_: pytest.fail("the job was started"))
    sentence = complain(command, monkeypatch, capsys, tmp_path)
    for part in parts:
        assert part in sentence
    assert not (tmp_path / "store").exists()


def test_an_unwritable_store_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    sentence = complain([f"store={tmp_path / 'file' / 'store'}"], monkeypatch, capsys, tmp_path)
    assert "must be a folder that can be written to" in sentence


def test_an_unwritable_run_folder_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    sentence = complain([f"hydra.run.dir={tmp_path / 'file' / 'run'}"], monkeypatch, capsys, tmp_path)
    assert "cannot be used" in sentence


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, None], ids=["empty", "garbage", "missing"])
def test_a_bad_checkpoint_is_one_sentence(
    content: bytes | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # Nothing is asked of the network.
    monkeypatch.setattr("diffusion.loading.model_source.hub_answers", lambda: False)
    checkpoint = tmp_path / "model.safetensors"
    if content is not None:
        checkpoint.write_bytes(content)
    sentence = complain(
        ["model=folder", f"model.source={checkpoint}", "judge=canvas", "evaluator=none"], monkeypatch, capsys, tmp_path
    )
    assert str(checkpoint) in sentence


def test_a_broken_prompt_set_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "prompts.csv").write_text("case_number,text\n0,a church\n")
    sentence = complain([f"concept.prompts={tmp_path / 'prompts.csv'}"], monkeypatch, capsys, tmp_path)
    assert "lacks the columns prompt" in sentence


def test_interrupting_is_one_line_and_exit_status_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("experiments.command.launch.run_job", interrupted)
    monkeypatch.setattr(sys, "argv", ["run.py", f"hydra.run.dir={tmp_path}", "hydra/job_logging=none", "tracker=off"])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / "run.py"), run_name="__main__")
    assert exit_.value.code == 130
    assert capsys.readouterr().err == "Interrupted; the same command continues where it stopped.\n"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def buggy(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("experiments.command.launch.run_job", buggy)
    monkeypatch.setattr(sys, "argv", ["run.py", f"hydra.run.dir={tmp_path}", "hydra/job_logging=none", "tracker=off"])
    monkeypatch.chdir(ROOT)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        runpy.run_path(str(ROOT / "run.py"), run_name="__main__")


def in_a_process(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False, env=environment
    )


def test_help_lists_every_choice_and_imports_nothing_heavy() -> None:
    shown = in_a_process("-X", "importtime", "run.py", "--help")
    assert shown.returncode == 0
    groups = ("attack", "concept", "eraser", "evaluator", "experiment", "method", "model", "pruning", "tracker")
    for group in (*groups, "prompt_set", "retained_set", "concept/artist", "concept/object"):
        choices = sorted(path.stem for path in (CONFIG_FOLDER / group).glob("*.yaml"))
        assert f"{group}: {', '.join(choices)}" in shown.stdout
    imported = {line.rpartition("|")[2].strip() for line in shown.stderr.splitlines()}
    assert not imported & {"torch", "diffusers", "transformers", "pandas", "wandb", "numpy"}


@pytest.mark.parametrize("command", [["model=sd14"], ["-m", "model=sd14", "eraser=esd,ac"]], ids=" ".join)
def test_a_model_that_is_not_here_is_told_before_anything_heavy_is_imported(command: list[str], tmp_path: Path) -> None:
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    told = in_a_process("-X", "importtime", "run.py", *command, **environment)
    assert told.returncode == 1
    *imports, sentence = told.stderr.splitlines()
    assert all(line.startswith("import time:") for line in imports)
    for part in ("'CompVis/stable-diffusion-v1-4' is neither", "hf download", "set model.source=FOLDER."):
        assert part in sentence
    imported = {line.rpartition("|")[2].strip() for line in imports}
    assert not imported & {"torch", "diffusers", "transformers", "pandas", "wandb", "numpy"}


@pytest.mark.parametrize("command", [["eraser=esdd"], ["-m", "eraser=esd,esdd"], ["--nothing"]], ids=" ".join)
def test_a_mistake_in_a_process_is_one_line_on_stderr_and_status_1(command: list[str], tmp_path: Path) -> None:
    ended = in_a_process("run.py", *command, f"hydra.run.dir={tmp_path}", f"hydra.sweep.dir={tmp_path}")
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def judge_files(folder: Path) -> dict[str, list[str]]:
    """What judges of published networks need, as small files of the same formats: networks that name the canvas's."""
    artists = write_vit(folder / "vit", ("vincent-van-gogh", "claude-monet"))
    write_hub_cache(folder, "microsoft/resnet-50", write_resnet(folder / "resnet", ("tench, Tinca tinca", "church")))
    (folder / "prompts.p").write_bytes(pickle.dumps(np.ones((2, 128), dtype=np.float16)))
    classifier = write_mean_classifier(folder / "classifier_model.onnx", np.eye(3, 2))
    clip = "judge.folder=canvas"
    return {
        "nudenet_v2": [f"judge.file={classifier}"],
        "object": ["concept=church"],
        "q16": [f"judge.prompts={folder / 'prompts.p'}", clip],
        "style": [f"judge.network={artists}"],
        "style_top3": [f"judge.network={artists}"],
        "style_clip": [clip],
        "clip_zeroshot": [clip],
    }


GROUPS = ("attack", "concept", "eraser", "evaluator", "judge", "method", "model", "pruning", "tracker")
CANVAS_CONCEPTS = {"church", "fire", "van_gogh", "van_gogh_church"}
"""Those of Stable Diffusion are built in tests/test_concept.py."""

CHOICES = [
    (group, path.stem)
    for group in GROUPS
    for path in sorted((CONFIG_FOLDER / group).glob("*.yaml"))
    if group != "concept" or path.stem in CANVAS_CONCEPTS
]


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_and_builds(
    group: str, choice: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    GlobalHydra.instance().clear()
    torch.save({"weight": torch.ones(1)}, tmp_path / "erased.pt")
    found = tmp_path / "found.csv"
    found.write_text("case_number,prompt,adversarial_prompt\n0,a church,a chapel\n")
    needed = {
        "folder": [f"model.source={tmp_path}"],
        "sd14": ["model.device=cpu"],
        "imported": [f"eraser.path={tmp_path / 'erased.pt'}"],
        "transfer": [f"attack.found={found}"],
        "retrained": [f"eraser.build={twin_folder(tmp_path)}"],
        **(judge_files(tmp_path) if group == "judge" else {}),
        **(quality_files(tmp_path) if group == "evaluator" else {}),
    }
    plus = "+" if group == "method" else ""
    # Stable Diffusion's own judge of Van Gogh and its evaluators are networks that no package brings.
    brought = ["judge=canvas", "evaluator=none"] if group == "model" else []
    job = make_job(f"{plus}{group}={choice}", *needed.get(choice, []), *brought)
    assert job.choices[group] == choice


def twin_folder(folder: Path) -> Path:
    """Where a model that never knew Van Gogh lies, as far as composing a job looks."""
    twin = folder / "twins" / "never_van_gogh_0"
    (twin / "unet").mkdir(parents=True)
    (twin / "unet" / "config.json").write_text("{}")
    shutil.copy(CANVAS_FOLDER / "recipe.json", twin)
    return twin.parent


def quality_files(folder: Path) -> dict[str, list[str]]:
    """What evaluators of Stable Diffusion need, as files that are read when pictures are measured."""
    (folder / "weights.pth").touch()
    Image.new("RGB", (8, 8)).save(folder / "photograph.png")
    weights = [f"evaluator.clip_score.weights={folder / 'weights.pth'}"]
    weights += [f"evaluator.fid.extractor.weights={folder / 'weights.pth'}"]
    own = [f"evaluator.{name}.weights={folder / 'weights.pth'}" for name in ("kid.extractor", "lpips")]
    return {"stable_diffusion": weights + own, "coco_10k": [*weights, f"evaluator.fid.reference={folder}"]}


@pytest.mark.parametrize(
    "command",
    [["attack=none,[random,none]"], ["hydra.searchpath=[file://{folder}]", "+experiment=mine"]],
    ids=["command line", "preset"],
)
def test_a_sweep_runs_lists_of_attacks(command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    preset = "# @package _global_\nhydra: {sweeper: {params: {attack: 'none,[random,none]'}}}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(preset)
    command = [part.format(folder=tmp_path) for part in command]
    jobs = []
    monkeypatch.setattr("experiments.command.launch.run_job", lambda job, *_: jobs.append(job) or tmp_path)
    monkeypatch.setattr("experiments.job.store.read_json", lambda _: {})
    monkeypatch.setattr("experiments.results.screen.show_sweep", lambda *_: None)
    quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none", "tracker=off", f"hydra.sweep.dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["run.py", "-m", *command, *quiet])
    monkeypatch.chdir(ROOT)
    GlobalHydra.instance().clear()
    runpy.run_path(str(ROOT / "run.py"), run_name="__main__")
    assert [job.choices["attack"] for job in jobs] == ["none", "random+none"]
    assert list(jobs[1].attack.members) == ["random", "none"]


def test_a_pair_is_refused_before_any_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusion.loading.ModelSource.load", lambda self: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match="has none"):
        make_job("eraser=none", "pruning=on")
