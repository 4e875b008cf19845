"""Whole jobs on stores that are damaged, shared with other models and code, or to be made anew."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic.dataclasses import dataclass
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusion.model import TextToImage
from diffusion.source_code import code_of
from evaluation.quality.collected import Collected
from evaluation.statistics import Mean
from experiments.job import keys
from experiments.job import origin as origins
from tests.night import all_but
from tests.tiny_job import overrides, run

SMALL = ("prompts=4", "retained=3", "attack.timesteps=2")


@dataclass(frozen=True)
class Level:
    """How light the pictures are."""

    def start(self) -> Collected:
        return Collected(
            lambda images, base, rows: {"level": images.double().mean((1, 2, 3)).tolist()},
            lambda values, prompts: Mean.bootstrapped(torch.tensor(values), seed=0),
        )


def command(world: Path, store: Path) -> list[str]:
    evaluator = f"+evaluator.level._target_={__name__}.Level"
    return [*overrides(world, store), *SMALL, evaluator, "pruning=off"]


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The summary of a job in a store that tests copy."""
    folder = tmp_path_factory.mktemp("finished")
    return run(command(world, folder / "store"), folder / "run") | {"store": folder / "store"}


@pytest.fixture
def store(finished: dict[str, Any], tmp_path: Path) -> Path:
    shutil.copytree(finished["store"], tmp_path / "store")
    return tmp_path / "store"


def numbers(summary: dict[str, Any]) -> dict[str, Any]:
    same = {key: summary[key] for key in ("run", "rates", "measures", "curve", "cases", "edit")}
    return same | {"costs": {stage: cost["unet_evaluations"] for stage, cost in summary["costs"].items()}}


def the(store: Path, pattern: str) -> Path:
    return sorted(store.glob(pattern))[0]


def change_every_50th_value(store: Path) -> None:
    path = the(store, "edits/*/edit.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for tensor in tensors.values():
        tensor.view(-1)[::50] *= 2
    save_file(tensors, path, metadata)


def cut(pattern: str) -> Callable[[Path], None]:
    def damage(store: Path) -> None:
        path = the(store, pattern)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


def write(pattern: str, text: str) -> Callable[[Path], None]:
    return lambda store: the(store, pattern).write_text(text) and None


def alter_an_outcome(store: Path) -> None:
    path = the(store, "attacks/*/outcomes.jsonl")
    lines = path.read_text().splitlines()
    entry = json.loads(lines[1])
    entry["success"] = not entry["success"]
    path.write_text("\n".join([lines[0], json.dumps(entry), *lines[2:]]) + "\n")


PICTURE = 2 * 2
"""U-Net evaluations of a picture."""

DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "values of the edit": (change_every_50th_value, "edit"),
    "a truncated edit": (cut("edits/*/edit.safetensors"), "edit"),
    "a missing edit": (lambda store: the(store, "edits/*/edit.safetensors").unlink(), "edit"),
    "the edit's result": (write("edits/*/result.json", '{"value": {"losses": 5}}'), "edit"),
    "a picture": (cut("pictures/*/*.png"), "picture"),
    "an outcome's line": (alter_an_outcome, "outcome"),
    "an outcome's picture": (cut("attacks/*/*.png"), "outcome"),
    "verdicts": (write("verdicts/*/result.json", "[true, true]"), "nothing"),
    "measures": (write("measures/*/result.json", "{}"), "nothing"),
    "a description": (write("pictures/*/config.json", "nonsense"), "nothing"),
}
QUICK = ("values of the edit", "a missing edit", "a picture", "an outcome's line", "verdicts")


@pytest.mark.parametrize("damage", all_but(QUICK, DAMAGES))
def test_what_is_damaged_is_made_again_once_and_nothing_else(
    damage: str,
    world: Path,
    finished: dict[str, Any],
    store: Path,
    model: TextToImage,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    harm, what = DAMAGES[damage]
    harm(store)
    with caplog.at_level(logging.WARNING):
        again = run(command(world, store), tmp_path / "again")
    assert numbers(again) == numbers(finished)
    spent = {
        "nothing": [0],
        "picture": [PICTURE],
        "edit": [finished["costs"]["edit"]["unet_evaluations"]],
        "outcome": [case["unet_evaluations"] for case in finished["cases"]],
    }[what]
    assert model.unet_evaluations in spent
    told = [record.getMessage() for record in caplog.records if str(store) in record.getMessage()]
    assert len(told) == 1
    assert "delete" not in told[0]

    evaluations = model.unet_evaluations
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        run(command(world, store), tmp_path / "once more")
    assert model.unet_evaluations == evaluations
    assert not [record for record in caplog.records if str(store) in record.getMessage()]


def test_fresh_makes_everything_anew(
    world: Path, finished: dict[str, Any], store: Path, model: TextToImage, tmp_path: Path
) -> None:
    again = run([*command(world, store), "fresh=true"], tmp_path / "again")
    assert numbers(again) == numbers(finished)
    assert model.unet_evaluations == sum(cost["unet_evaluations"] for cost in finished["costs"].values())


def test_a_model_of_other_settings_and_the_same_weights_gets_nothing_of_the_first_one(
    world: Path, finished: dict[str, Any], store: Path, tmp_path: Path
) -> None:
    other = tmp_path / "world"
    shutil.copytree(world, other)
    path = other / "model" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "beta_end": 0.02}))
    changed = run(command(other, store), tmp_path / "changed")
    alone = run(command(other, tmp_path / "new"), tmp_path / "alone")
    assert numbers(changed) == numbers(alone)
    assert changed["run"] != finished["run"]
    path.write_bytes((world / "model" / "scheduler" / "scheduler_config.json").read_bytes())
    assert numbers(run(command(other, store), tmp_path / "copy")) == numbers(finished)


def test_other_code_of_the_eraser_erases_again_and_takes_the_base_pictures(
    world: Path,
    finished: dict[str, Any],
    store: Path,
    model: TextToImage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(keys, "code_of", lambda thing: "new" if type(thing).__name__ == "ESD" else code_of(thing))
    again = run(command(world, store), tmp_path / "again")
    assert model.unet_evaluations == finished["costs"]["edit"]["unet_evaluations"]
    assert again["run"] != finished["run"]
    assert again["edit"]["hash"] != finished["edit"]["hash"]
    # It changed nothing, so what was made with the edit is still true.
    assert again["cases"] == finished["cases"]


def test_the_summary_says_which_revision_and_machine_made_each_artefact(
    world: Path, finished: dict[str, Any], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stage in ("base", "edit", "erased", "attack", "measures"):
        (made,) = finished["origins"][stage]
        assert made == {key: finished[key] for key in made}
        assert made["threads"] == 1
        assert made["processes"] == 1
        assert made["device"] == "cpu"
        assert made["capability"] == torch.backends.cpu.get_cpu_capability()
    monkeypatch.setattr(origins, "git_state", lambda folder: {"revision": "later", "dirty": True})
    again = run([*command(world, store), "attack.timesteps=1"], tmp_path / "again")
    assert again["git"] == {"revision": "later", "dirty": True}
    revisions = {stage: [made["git"] for made in again["origins"][stage]] for stage in again["origins"]}
    assert revisions == {stage: [finished["git"]] for stage in revisions} | {"attack": [again["git"]]}


def test_a_small_model_is_computed_with_one_thread_unless_told_otherwise(
    world: Path, finished: dict[str, Any], store: Path, model: TextToImage, tmp_path: Path
) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        run(command(world, store), tmp_path / "again")
        assert model.unet_evaluations == 0
        assert torch.get_num_threads() == 2
        two = run([*command(world, store), "threads=2"], tmp_path / "two")
    finally:
        torch.set_num_threads(before)
    assert two["threads"] == 2
    assert two["edit"]["hash"] != finished["edit"]["hash"]


def test_a_broken_summary_of_another_run_fails_no_pruned_job(
    world: Path, finished: dict[str, Any], store: Path, tmp_path: Path
) -> None:
    for name, text in {"one": "{", "two": '{"schema": 2}', "three": '{"schema": 3, "choices": 5}'}.items():
        (store / "runs" / name).mkdir()
        (store / "runs" / name / "summary.json").write_text(text)
    pruned = run([*command(world, store), "pruning=on", "pruning.steps=3"], tmp_path / "pruned")
    assert pruned["unpruned"]["run"] == finished["run"]
