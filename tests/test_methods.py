"""``eraselab new`` and ``check``: what is written runs, and a breach of the protocol is told in a sentence."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from diffusion.plugins import PLUGINS_VARIABLE
from experiments.command.errors import CommandError
from experiments.command.methods import writing
from experiments.command.methods.checking import check_method, find_method
from experiments.command.methods.writing import HOMES, write_method

DOCS = Path(__file__).resolve().parents[1] / "docs"
BLOCK = re.compile(r'^```\w+ title="(?P<path>[^"]+)"\n(?P<text>.*?)^```$', re.MULTILINE | re.DOTALL)


@contextmanager
def plugins_below(home: Path) -> Iterator[pytest.MonkeyPatch]:
    """Undo at the end what declaring plugins in the folder ``home`` does to the process."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PLUGINS_VARIABLE, os.environ.get(PLUGINS_VARIABLE, ""))
        patch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
        patch.setattr(sys, "path", list(sys.path))
        yield patch
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(home)):
            del sys.modules[name]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder for plugins; what declaring them does is undone."""
    with plugins_below(tmp_path):
        yield tmp_path / "methods"


def written_in(page: str, folder: Path) -> None:
    """Write the files that a page of the documentation shows."""
    for block in BLOCK.finditer((DOCS / "howto" / page).read_text(encoding="utf-8")):
        path = folder / block["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block["text"], encoding="utf-8")


@pytest.mark.parametrize("kind", HOMES)
def test_what_new_writes_passes_its_check(kind: str, folder: Path) -> None:
    paths = write_method(kind, f"my_{kind}", folder)
    assert [path.relative_to(folder).as_posix() for path in paths] == [
        f"my_{kind}.py",
        f"conf/{kind}/my_{kind}.yaml",
        f"tests/test_my_{kind}.py",
    ]
    said = list(check_method(f"my_{kind}", plugins=folder))
    assert said[0].startswith(f"{kind}=my_{kind} makes My{kind.capitalize()} ({paths[0]}, line ")
    assert said[-1].startswith("a whole job of 3 prompts ends")


def test_what_new_writes_into_the_repository_is_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for home in ("tests", "conf", *HOMES.values()):
        (tmp_path / home).mkdir(parents=True)
    monkeypatch.setattr(writing, "CONFIG_FOLDER", tmp_path / "conf")
    paths = [path for kind in HOMES for path in write_method(kind, f"my_{kind}")]
    assert tmp_path / "erasure" / "erasers" / "my_eraser.py" in paths
    assert "_target_: evaluation.judges.my_judge.MyJudge" in (tmp_path / "conf" / "judge" / "my_judge.yaml").read_text()
    shutil.copy(DOCS.parent / "pyproject.toml", tmp_path)
    for command in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        told = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert told.returncode == 0, told.stdout


@pytest.mark.parametrize("kind", ["eraser", "pruning", "attack", "judge"])
def test_the_how_to_of_each_kind_passes_the_check(kind: str, folder: Path) -> None:
    written_in(f"{kind}.md", folder)
    (choice,) = (path.stem for path in (folder / "conf" / kind).glob("*.yaml"))
    assert list(check_method(f"{kind}={choice}", plugins=folder))


ERASER = """
from pathlib import Path
import torch
from erasure.edit import Edit
from erasure.finetuning import prune_after
from erasure.protocols import Erasure
from diffusion.checked import checked


@checked
class Broken:
    has_objective = False

    def erase(self, model, concept, pruning, *, seed, checkpoint=None):
        {body}
"""
FAULTS = {
    "nothing returned": (
        "pass",
        r"Broken \(.*broken.py, line 10\): erase returned NoneType; it must return an erasure",
    ),
    "another type": ("return Edit.identity()", r"erase returned Edit; it must return an erasure.protocols.Erasure"),
    "no edit in it": ("return Erasure({}, [], 0)", r"the edit of its Erasure is dict; it must be an erasure.edit.Edit"),
    "a changed model": (
        "torch.nn.init.zeros_(model.network.conv_in.weight); return Erasure(Edit.identity(), [], 0)",
        r"erase changes the model; it must leave it as it was",
    ),
    "the global stream": (
        "old = {'conv_in.bias': model.network.conv_in.bias.detach()}; "
        "new = {name: torch.randn_like(value) for name, value in old.items()}; "
        "return Erasure(Edit.from_weights(old, new), [], 0)",
        r"with seed=0 makes another edit the second time; draw what is random from",
    ),
    "no pruning": (
        "return Erasure(Edit.identity(), [], 0)",
        r"makes the same edit with pruning=magnitude as without; end it with erasure.finetuning.prune_after",
    ),
    "a bug": ("return 1 / 0", r"erase fails on the tiny model: .*broken.py, line 15: ZeroDivisionError"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_eraser_is_refused_with_the_cause(fault: str, folder: Path) -> None:
    body, sentence = FAULTS[fault]
    (folder / "conf" / "eraser").mkdir(parents=True)
    (folder / "conf" / "eraser" / "broken.yaml").write_text("_target_: broken.Broken\n")
    (folder / "broken.py").write_text(ERASER.format(body=body))
    with pytest.raises(CommandError, match=sentence):
        list(check_method("broken", plugins=folder))


CHANGES = {
    "a missing erase": ("eraser", "def erase(", "def rease(", r"has no method erase, which every eraser needs"),
    "other arguments": (
        "eraser",
        "*, seed: int, ",
        "",
        r"erase takes .*; it must take \(model, concept, pruning, \*, seed",
    ),
    "no threat model": ("attack", "threat_model: ", "threats: ", r"does not say threat_model, which every attack must"),
    "a wrong threat model": ("attack", '"black_box"', '"grey_box"', r"threat_model is 'grey_box'; it must be one of"),
    "an outcome too few": (
        "attack",
        "cases, judge, propose",
        "cases[1:], judge, propose",
        r"ended without an outcome for 1",
    ),
    "a picture that is not counted": (
        "attack",
        "            return [",
        "            model.generate(['a look'], seeds=[0], steps=2, guidance=1.0)\n            return [",
        r"its checks tell of [\d,]+ U-Net evaluations and [\d,]+ were made",
    ),
    "a tuple of verdicts": (
        "judge",
        "Verdicts(present=share >= self.threshold, score=share)",
        "share",
        "returned Tensor",
    ),
    "scores above one": ("judge", "score=share)", "score=255 * share)", r"it must be float \[5\] from 0 to 1"),
    "a look at the others": ("judge", "/ light.sum(dim=1)", "/ light.sum(dim=1).max()", "must be judged by itself"),
    "no masks": ("pruning", "return self.sparsity.kept(scores), 0", "return scores", r"my_pruning.py, line \d+"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_breaks_the_protocol_is_told(change: str, folder: Path) -> None:
    kind, before, after, sentence = CHANGES[change]
    path = write_method(kind, f"my_{kind}", folder)[0]
    source = path.read_text()
    assert before in source
    path.write_text(source.replace(before, after))
    with pytest.raises(CommandError, match=sentence):
        list(check_method(f"{kind}=my_{kind}", plugins=folder))


def test_an_outcome_that_depends_on_the_other_cases_is_told(folder: Path) -> None:
    path = write_method("attack", "crowded", folder)[0]
    path.write_text(path.read_text().replace("self.beginnings[trace.attempts]", "' '.join('so' for _ in traces)"))
    with pytest.raises(CommandError, match=r"no outcome may depend on the other cases"):
        list(check_method("crowded", plugins=folder))


def test_names_that_cannot_be_taken_are_refused(folder: Path) -> None:
    refused = {
        ("eraser", "esd"): "eraser=esd is taken by",
        ("eraser", "My-Own"): "is no name for a method",
        ("eraser", "class"): "is no name for a method",
        ("attack", "json"): "is the name of an installed module",
        ("guard", "mine"): "guard is no kind of method; the kinds are attack, eraser, judge, pruning",
    }
    for (kind, name), sentence in refused.items():
        with pytest.raises(CommandError, match=sentence):
            write_method(kind, name, folder)
    write_method("eraser", "mine", folder)
    with pytest.raises(CommandError, match=r"mine.py is there already"):
        write_method("attack", "mine", folder)


def test_a_method_is_found_by_its_name_if_that_is_one_of_a_single_kind() -> None:
    assert find_method("esd") == ("eraser", "esd")
    assert find_method("attack=random") == ("attack", "random")
    for told, sentence in {
        "random": "write pruning=random or attack=random",
        "esdd": r"did you mean esd\?",
        "model=canvas": "is no kind of method",
    }.items():
        with pytest.raises(CommandError, match=sentence):
            find_method(told)
