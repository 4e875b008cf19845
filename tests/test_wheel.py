"""What is installed from a wheel has its configs and prompts, and works from any folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

COMPOSE = """
from pathlib import Path
from diffusion.files import shipped
from experiments import CONFIG_FOLDER
from experiments.command.composing import compose_job
from experiments.command.explaining import choices
from experiments.command.methods.writing import write_method

config, _ = compose_job(["concept=church", "eraser=esd"])
print(CONFIG_FOLDER)
print(shipped(Path(config.concept.prompts)))
print(len(choices("eraser")))
print(*write_method("eraser", "mine", Path("methods")), sep=" ")
try:
    write_method("eraser", "mine")
except Exception as error:
    print(error)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that a wheel holds, in a folder outside the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    setup = [sys.executable, "-c", "from setuptools import setup; setup()", "-q"]
    steps = ["egg_info", "--egg-base", str(folder), "build_py", "--build-lib", str(folder / "lib")]
    subprocess.run([*setup, *steps], cwd=ROOT, check=True, capture_output=True)
    return folder / "lib"


def files(folder: Path, suffixes: set[str]) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in suffixes and "__pycache__" not in path.parts
    }


def test_a_wheel_holds_every_config_prompt_module_and_template(installed: Path) -> None:
    assert files(installed / "experiments" / "conf", {".yaml"}) == files(ROOT / "conf", {".yaml"})
    assert files(installed / "diffusion" / "prompts", {".csv"}) == files(ROOT / "prompts", {".csv"})
    data = {".py", ".jinja", ".html", ".css", ".js", ".csv", ".yaml", ".safetensors", ".json"}
    for package in ("attacks", "diffusion", "erasure", "evaluation", "experiments"):
        assert files(ROOT / package, data) <= files(installed / package, data)


def test_an_installed_package_composes_and_writes_methods_from_any_folder(installed: Path, tmp_path: Path) -> None:
    told = subprocess.run(
        [sys.executable, "-c", COMPOSE],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    configs, prompts, erasers, written, refusal = told.stdout.splitlines()
    assert configs == str(installed / "experiments" / "conf")
    assert prompts == str(installed / "diffusion" / "prompts" / "canvas" / "church.csv")
    assert int(erasers) == len(list((ROOT / "conf" / "eraser").glob("*.yaml")))
    assert written.split() == [str(tmp_path / "methods" / each) for each in METHOD]
    assert refusal.endswith("is no checkout of this project; name a folder of your own with --into FOLDER.")


METHOD = ("mine.py", "conf/eraser/mine.yaml", "tests/test_mine.py")
