"""The documentation: what it tells to type can be typed, and its code runs as written."""

import contextlib
import copy
import importlib.util
import io
import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from nbclient import NotebookClient
from typer.main import get_command

from experiments.command.arguments import tidy_arguments
from experiments.command.console import app
from experiments.command.explaining import choices, groups
from experiments.command.plugins import take_plugins
from experiments.command.shorthands import spell_out
from experiments.fit import fitted
from tests.test_methods import BLOCK, plugins_below, written_in
from tests.tiny_job import CONFIG_FOLDER, make_job

ROOT = CONFIG_FOLDER.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINE = re.compile(r"^(?:    |\$ )(?:\.venv/bin/)?((?:python run\.py|eraselab|make) .*)$", re.MULTILINE)
INLINE = re.compile(r"`((?:python run\.py|eraselab|make) [^`]+)`")
METHODS = "my_methods"


def commands(page: Path) -> Iterator[str]:
    """Everything that a page tells to type: lines of its indented blocks and what stands in its running text."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    yield from LINE.findall(text)
    yield from INLINE.findall(text.replace("\n", " "))


TYPED = sorted({command for page in PAGES for command in commands(page)})


@pytest.fixture(scope="module")
def methods(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The plugin of the how-to pages, in a working folder in which everything else that pages name lies too."""
    home = tmp_path_factory.mktemp("docs")
    for page in (ROOT / "docs" / "howto").glob("*.md"):
        written_in(page.name, home / METHODS)
    with plugins_below(home) as patch:
        patch.chdir(home)
        take_plugins([f"plugins={home / METHODS}"])
        yield home / METHODS


def test_the_pages_tell_what_to_type() -> None:
    assert len(TYPED) > 60
    assert {"make demo", "make test"} <= set(TYPED)


@pytest.mark.parametrize("typed", [each for each in TYPED if not each.startswith("make ")])
def test_every_command_of_the_pages_composes(typed: str, methods: Path) -> None:
    words = shlex.split(typed, comments=True)
    if words[0] == "python":
        words = ["eraselab", "run", *words[2:]]
    _, name, *arguments = words
    own = [word for word in arguments if not word.startswith("plugins=")]
    if name == "run":
        composes(own)
        return
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    if name == "store":
        command = command.commands[own.pop(0)] if own else command
    if own and "..." not in " ".join(own):
        read = command.make_context(name, own, resilient_parsing=False)
        given = read.params.get("overrides") or []
        composes(list(given))


def composes(arguments: list[str]) -> None:
    """See to it that Hydra composes every job of a command line, and that its settings fit."""
    if "--help" in arguments or arguments == ["..."] or not arguments:
        return
    given = spell_out(tidy_arguments(arguments))
    flags = {each for each in given if each in {"-m", "--multirun"}}
    overrides = OverridesParser.create().parse_overrides([each for each in given if each not in flags])
    swept = [each for each in overrides if each.is_sweep_override()]
    assert bool(flags) or not swept
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        for batch in BasicSweeper.split_arguments(overrides, max_batch_size=None):
            for job in batch:
                config = compose("config", job)
                if "???" not in str(config):
                    fitted(config)


@pytest.mark.parametrize("typed", [each for each in TYPED if each.startswith("make ")])
def test_every_make_target_of_the_pages_is_there(typed: str) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    words = [word for word in shlex.split(typed, comments=True)[1:] if "=" not in word]
    assert set(words) <= set(targets)


def test_the_concept_the_prompts_and_the_evaluator_of_the_pages_make_a_job(methods: Path) -> None:
    job = make_job(
        *("concept=gas_pump", "prompt_set=night", "evaluator=brightness", "prompts=1", "retained=2", "tracker=off")
    )
    assert [row.prompt for row in job.prompts] == ["a red gas pump at night"]
    assert (job.concept.name, list(job.evaluators)) == ("gas_pump", ["brightness"])
    measured = job.evaluators["brightness"].start()
    white = torch.full((2, 3, 4, 4), 255, dtype=torch.uint8)
    measured.update(white, white // 5, job.retained)
    values = measured.compute()
    assert (values["brightness"]["mean"], values["brightness_base"]["mean"]) == (255, 51)


@pytest.mark.parametrize("group", ["model", "concept", "eraser", "pruning", "attack"])
def test_the_page_of_commands_names_every_choice(group: str) -> None:
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    missing = [path.stem for path in (CONFIG_FOLDER / group).glob("*.yaml") if f"`{path.stem}`" not in text]
    assert not missing


def test_links_between_pages_lead_somewhere() -> None:
    made = {"fields", "published.md", "results", "canvas", "canvas_mmdit"}
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)", text):
            if "://" not in link and not {part for part in Path(link).parts} & made:
                assert (page.parent / link).exists(), f"{page}: {link}"


def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_has_every_field_of_every_choice_and_the_published_numbers() -> None:
    pages = dict(hooks().generated_pages())
    assert set(pages) == {f"fields/{name}.md" for name in [*groups(), "job", "index"]} | {"published.md"}
    for group in groups():
        for choice in choices(group):
            assert f"{group}={choice}`" in pages[f"fields/{group}.md"]
    rate = "1e-05 (diffusers: 5e-05, sd3: 0.0001, flux: 0.0001, canvas: 0.0005)"
    assert f"| `eraser.learning_rate=` | {rate} | Adam's." in pages["fields/eraser.md"]
    assert "`sampling.steps=` | 50 (sd3: 28, flux: 28, schnell: 4, canvas: 20)" in pages["fields/job.md"]
    assert "| `seed=` | 0 | Seed of the eraser and of the attack" in pages["fields/job.md"]
    assert pages["published.md"].count("UnlearnDiffAtk leaderboard of nudity") > 10
    for text in pages.values():
        rows = [line for line in text.splitlines() if line.startswith("|")]
        for before, row in pairwise(rows):
            if row.startswith("| `"):
                assert len(re.findall(r"(?<!\\)\|", row)) == len(re.findall(r"(?<!\\)\|", before)), row


def printed(program: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a program prints that is run in the project's folder."""
    (folder / "program.py").write_text(program, encoding="utf-8")
    monkeypatch.chdir(ROOT)
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        runpy.run_path(str(folder / "program.py"), run_name="__main__")
    return shown.getvalue()


def test_the_readmes_python_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (line,) = printed(snippet, tmp_path, monkeypatch).splitlines()
    assert line.endswith((" True", " False"))


NOTEBOOK = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)


def check_notebook(told: str) -> None:
    """Its judge and its attack said what they should."""
    assert "shown before: [True, False]" in told
    assert re.search(r"\d+ of 4|\(\d/4\)", told)


def test_the_notebooks_cells_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(cell.get("outputs") for cell in NOTEBOOK.cells)
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = [cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code"]
    check_notebook(printed("\n\n".join(cells), tmp_path, monkeypatch))


@pytest.mark.slow
def test_the_notebook_runs_as_written_in_a_kernel(tmp_path: Path) -> None:
    notebook = copy.deepcopy(NOTEBOOK)
    # A kernel of this interpreter, wherever others are installed.
    kernels = tmp_path / "kernels" / "python3"
    kernels.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernels / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "3", "language": "python"}))
    patch = pytest.MonkeyPatch()
    patch.setenv("JUPYTER_PATH", str(tmp_path))
    try:
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    finally:
        patch.undo()
    told = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    check_notebook(told)
