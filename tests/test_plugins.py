"""Methods of others: one Python file and one YAML file outside the repository, and what is said of their faults."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from diffusion.plugins import PLUGINS_VARIABLE
from erasure.addition import addition_class
from experiments.command import console
from experiments.command.collect import collect_runs
from experiments.command.config import make_object
from experiments.command.errors import CommandError, explain
from experiments.command.plugins import take_plugins
from experiments.job.store import read_json
from experiments.results.tables import write_tables
from tests.tiny_job import make_job, overrides, run

SOURCE = '''
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from attacks.none import NoAttack
from diffusion.guard import Guard
from erasure.addition import Addition, set_guard
from erasure.edit import Edit
from erasure.protocols import Erasure


class LoudReader(Guard):
    """Reads everything louder."""

    def __init__(self, factor):
        self.factor = factor

    def read(self, token_embeddings, eos_positions, encode):
        return self.factor * encode(token_embeddings, eos_positions)


class Louder(Addition):
    """Says everything louder."""

    kind = "louder"
    is_guard = True

    def __init__(self, factor):
        self.factor = factor

    def settings(self):
        return {}

    def tensors(self):
        return {"factor": self.factor}

    @classmethod
    def restored(cls, settings, tensors):
        return cls(tensors["factor"])

    def attach(self, model):
        return set_guard(model, LoudReader(float(self.factor)))


@dataclass(frozen=True)
class Mine:
    """An eraser."""

    factor: float = 2.0
    has_objective: ClassVar[bool] = False

    def erase(self, model, concept, pruning, *, seed, checkpoint=None):
        return Erasure(Edit({}, {"method": "mine"}, (Louder(torch.tensor(self.factor)),)), [], 0)


@dataclass(frozen=True)
class Theirs(NoAttack):
    """An attack."""

    drop: int = 0

    def run(self, model, cases, judge, **named):
        yield from super().run(model, cases[self.drop:], judge, **named)
'''


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A plugin in a file of its own, not yet declared; what declaring it does is undone."""
    home = tmp_path / "elsewhere"
    for group, choice, target in (("eraser", "mine", "Mine"), ("attack", "theirs", "Theirs")):
        (home / "conf" / group).mkdir(parents=True)
        (home / "conf" / group / f"{choice}.yaml").write_text(f"_target_: my_methods.{target}\n")
    (home / "my_methods.py").write_text(SOURCE)
    monkeypatch.setenv(PLUGINS_VARIABLE, os.environ.get(PLUGINS_VARIABLE, ""))
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_methods", raising=False)
    yield home / "my_methods.py"
    sys.modules.pop("my_methods", None)


def attacked(world: Path, store: Path, *choices: str) -> list[str]:
    return [*(part for part in overrides(world, store) if not part.startswith(("eraser.", "attack."))), *choices]


def test_an_eraser_a_guard_and_an_attack_of_a_plugin_make_a_run_that_the_store_gives_back_and_pages_show(
    plugin: Path,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert take_plugins(["eraser=mine", f"plugins={plugin}"]) == ["eraser=mine"]
    command = attacked(world, tmp_path / "store", "eraser=mine", "attack=theirs")
    first = run(command, tmp_path / "first")
    assert (first["choices"]["eraser"], first["choices"]["attack"]) == ("mine", "theirs")
    (edit,) = (tmp_path / "store" / "edits").glob("*/edit.safetensors")
    assert b"my_methods.Louder" in edit.read_bytes()
    again = run(command, tmp_path / "again")
    assert (again["cases"], again["edit"]["hash"]) == (first["cases"], first["edit"]["hash"])
    other = run([*command, "+eraser.factor=-3"], tmp_path / "other")
    assert other["artefacts"]["erased"] != first["artefacts"]["erased"]

    # As in a process of its own, which knows the plugin by what is typed alone.
    monkeypatch.setenv(PLUGINS_VARIABLE, "tests")
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(plugin.parent)])
    monkeypatch.delitem(sys.modules, "my_methods")
    shared = ("--store", str(tmp_path / "store"), "--folder", str(tmp_path / "pages"), f"plugins={plugin}")
    monkeypatch.setattr(sys, "argv", ["eraselab", "report", first["run"], *shared])
    capsys.readouterr()
    console.main()
    page = Path(capsys.readouterr().out.strip()).read_text()
    assert "mine" in page and "theirs" in page and first["run"] in page


def test_a_preset_of_a_plugin_is_collected_into_tables(plugin: Path, world: Path, tmp_path: Path) -> None:
    preset = plugin.parent / "conf" / "experiment" / "mine.yaml"
    preset.parent.mkdir()
    choices = ["override /eraser: mine", "override /attack: theirs"]
    lines = [*(f"  - {choice}" for choice in choices), "hydra:", "  sweeper:", "    params:", "      seed: 0,1"]
    preset.write_text("\n".join(["# @package _global_", "defaults:", *lines]) + "\n")
    take_plugins([f"plugins={plugin}"])
    command = attacked(world, tmp_path / "store")
    run([*command, "+experiment=mine", "seed=1"], tmp_path / "run")
    (found,), missing = collect_runs("mine", command)
    assert (found["choices"]["eraser"], found["config"]["seed"], len(missing)) == ("mine", 1, 1)
    write_tables([found], "mine", tmp_path / "tables")
    assert "mine" in (tmp_path / "tables" / "mine.md").read_text()


@pytest.mark.parametrize("how", ["file", "folder", "package"])
def test_a_plugin_is_a_file_a_folder_or_a_package(how: str, plugin: Path, world: Path, tmp_path: Path) -> None:
    path = {"file": plugin, "folder": plugin.parent, "package": plugin.parent}[how]
    if how == "package":
        plugin.rename(path / "__init__.py")
        path = path.rename(tmp_path / "my_methods")
    take_plugins([f"plugins={path}"])
    assert make_job(*attacked(world, tmp_path / "store", "eraser=mine", "attack=none")).eraser.factor == 2


def test_a_process_that_is_started_finds_the_plugin(plugin: Path) -> None:
    plugin.write_text("LOUD = 2\n")
    take_plugins([f"plugins={plugin}"])
    program = "import my_methods, diffusion.plugins as plugins; print(my_methods.LOUD, *plugins.declared_plugins())"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert {"2", "my_methods"} < set(told.stdout.split())


@pytest.mark.slow
def test_two_processes_find_the_plugin_too(plugin: Path, world: Path, tmp_path: Path) -> None:
    command = attacked(world, tmp_path / "store", "eraser=mine", "attack=theirs", "processes=2")
    told = subprocess.run(
        [sys.executable, "run.py", f"plugins={plugin}", *command, f"hydra.run.dir={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    assert read_json(tmp_path / "run" / "summary.json")["n"] == 5


def test_an_attack_that_drops_a_case_is_named_with_it(plugin: Path, world: Path, tmp_path: Path) -> None:
    take_plugins([f"plugins={plugin}"])
    with pytest.raises(ValueError, match=r"my_methods.Theirs ended without .* for 1 of 5 .* case 0 \('a church'\)"):
        run(attacked(world, tmp_path / "store", "eraser=none", "attack=theirs", "+attack.drop=1"), tmp_path / "run")


FAULTS = {
    "an import": ("import nothing_of_the_kind\n", r"my_methods.py, line 1: ModuleNotFoundError: No module named"),
    "a bug": ("\n\nx = 1 / 0\n", r"my_methods.py, line 3: ZeroDivisionError: division by zero"),
    "a slip": ("class Mine(:\n", r"my_methods.py, line 1: SyntaxError"),
    "another name": (
        "class Mien: pass\n",
        r"Mine is not in .*my_methods.py; there are Mien \(did you mean Mien",
    ),
    "no method": ("class Mine:\n    has_objective = False\n", r"Mine \(.*my_methods.py, line 1\) has no method erase"),
    "no attribute": ("class Mine:\n    def erase(self): pass\n", r"Mine \(.*line 1\) does not say has_objective"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_plugin_is_told_with_its_line(fault: str, plugin: Path) -> None:
    source, sentence = FAULTS[fault]
    plugin.write_text(source)
    take_plugins([f"plugins={plugin}"])
    with pytest.raises(CommandError, match=sentence):
        make_object(OmegaConf.create({"eraser": {"_target_": "my_methods.Mine"}}), "eraser")


def test_a_yaml_file_without_a_class_is_told() -> None:
    with pytest.raises(CommandError, match="eraser has no _target_"):
        make_object(OmegaConf.create({"eraser": {"steps": 3}}), "eraser")


def test_an_eraser_that_returns_something_else_is_named(plugin: Path, world: Path, tmp_path: Path) -> None:
    plugin.write_text(
        SOURCE.replace("        return Erasure(Edit({", "        return {}\n        return Erasure(Edit({")
    )
    take_plugins([f"plugins={plugin}"])
    with pytest.raises(ValueError, match=r"my_methods.Mine.erase returned dict; it must return an erasure.protocols"):
        run(attacked(world, tmp_path / "store", "eraser=mine", "attack=none"), tmp_path / "run")


def test_what_is_no_plugin_or_has_a_name_of_the_projects_is_refused(plugin: Path) -> None:
    with pytest.raises(CommandError, match="plugins=/nowhere is no plugin"):
        take_plugins(["plugins=/nowhere"])
    (plugin.parent / "conf" / "eraser" / "esd.yaml").write_text("_target_: my_methods.Mine\n")
    with pytest.raises(CommandError, match=r"conf/eraser/esd.yaml has the name of a choice of this project"):
        take_plugins([f"plugins={plugin}"])


def test_an_addition_of_a_plugin_that_is_not_declared_is_not_imported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="of a plugin that is not declared"):
        addition_class("antigravity.Guard")
    assert "antigravity" not in sys.modules


def test_a_value_error_of_a_plugin_is_a_sentence(plugin: Path) -> None:
    plugin.write_text("def refuse():\n    raise ValueError('factor is 0; it must be more')\n")
    take_plugins([f"plugins={plugin}"])
    import my_methods  # noqa: PLC0415

    with pytest.raises(ValueError) as raised:
        my_methods.refuse()
    assert explain(raised.value) == "factor is 0; it must be more."
