"""A config is data: what it names as a class is one of the project or of a declared plugin, or nothing is made."""

import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from diffusion import plugins
from diffusion.plugins import PLUGINS_VARIABLE
from experiments.command.config import make_object
from experiments.command.errors import CommandError
from experiments.command.targets import require_known_targets
from tests.tiny_job import CONFIG_FOLDER

FOREIGN = {
    "a command": "os.system",
    "a file's end": "pathlib.Path.unlink",
    "a download": "urllib.request.urlopen",
    "a pickle": "torch.load",
    "a browser": "webbrowser.open",
    "by way of a module of ours": "erasure.export.shutil.rmtree",
    "by way of a class of ours": "erasure.edit.Edit.load",
    "a function of ours": "diffusion.files.write_atomically",
    "a class that a module of ours imports": "erasure.edit.Path",
    "a name that begins alike": "attacks_of_mine.Attack",
    "no text": 3,
}


@pytest.mark.parametrize("target", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("nested", [False, True])
def test_nothing_but_classes_of_the_project_is_called(target, nested, tmp_path):
    (tmp_path / "kept").write_text("kept")
    node = {"_target_": target, "_args_": [str(tmp_path / "kept")]}
    node = {"_target_": "erasure.erasers.none.NoEraser", "steps": [{"inner": node}]} if nested else node

    with pytest.raises(
        CommandError, match=r"_target_ is .*; it must be a class of attacks, diffusion, .* or of a plugin"
    ):
        make_object(OmegaConf.create({"eraser": node}), "eraser")
    assert (tmp_path / "kept").exists()


def test_every_choice_of_the_project_is_a_class_of_its_own():
    for file in CONFIG_FOLDER.rglob("*.yaml"):
        config = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        if "hydra" not in file.parts:
            require_known_targets(config, file.stem)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "their_erasers.py").write_text(
        "class Theirs:\n    has_objective = False\n    def __init__(self, k): self.k = k\n    def erase(self): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "their_erasers", raising=False)
    return "their_erasers"


def test_a_declared_plugin_is_taken(plugin, monkeypatch):
    config = OmegaConf.create({"eraser": {"_target_": f"{plugin}.Theirs", "k": 3}})
    monkeypatch.setenv(PLUGINS_VARIABLE, "others")
    with pytest.raises(CommandError, match=rf"eraser._target_ is '{plugin}.Theirs'"):
        make_object(config, "eraser")

    monkeypatch.setenv(PLUGINS_VARIABLE, f"others, {plugin}")
    assert make_object(config, "eraser").k == 3


def test_an_installed_plugin_is_taken(plugin, monkeypatch):
    entries = EntryPoints([EntryPoint("theirs", f"{plugin}:Theirs", plugins.PLUGINS_GROUP)])
    monkeypatch.setattr(plugins, "entry_points", lambda group: entries.select(group=group))
    plugins.installed_plugins.cache_clear()
    try:
        config = OmegaConf.create({"eraser": {"_target_": f"{plugin}.Theirs", "k": 3}})
        assert make_object(config, "eraser").k == 3
    finally:
        plugins.installed_plugins.cache_clear()


def test_a_class_that_does_not_exist_is_told_as_such():
    with pytest.raises(CommandError, match=r"cannot be imported: nothing is not in .*erasure"):
        make_object(OmegaConf.create({"eraser": {"_target_": "erasure.nothing.Class"}}), "eraser")
