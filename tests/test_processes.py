"""Several processes share the prompts of one job and change none of its numbers."""

from pathlib import Path
from typing import Any

import pytest

from experiments.command.launch import run_share
from experiments.job.processes import Processes, run_in_processes
from experiments.job.store import read_json
from tests.test_job import numbers
from tests.tiny_job import make_job, overrides

LOGGING = {"version": 1, "disable_existing_loggers": False}


def run_shared(command: list[str], folder: Path, count: int = 2) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    job = make_job(*command)
    run_in_processes(count, run_share, job.config, job.choices, folder, LOGGING)
    summary: dict[str, Any] = read_json(folder / "summary.json")
    return summary


def test_two_processes_give_the_numbers_of_one(
    world: Path,
    undisturbed: dict[str, Any],
    tmp_path: Path,
) -> None:
    shared = run_shared(overrides(world, tmp_path / "store"), tmp_path / "run")
    assert numbers(shared) == numbers(undisturbed)
    journals = sorted((tmp_path / "store" / "attacks").glob("*/outcomes*.jsonl"))
    assert [(path.name, len(path.read_text().splitlines())) for path in journals] == [
        ("outcomes.1.jsonl", 2),
        ("outcomes.jsonl", 3),
    ]


def test_one_process_goes_on_where_two_were(world: Path, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    store = tmp_path / "store"
    run_shared([*overrides(world, store), "prompts=3"], tmp_path / "two")
    lines = {path.name: path.read_text() for path in store.glob("attacks/*/outcomes*.jsonl")}
    again = run_shared(overrides(world, store), tmp_path / "one", count=1)
    assert numbers(again) == numbers(undisturbed)
    (other,) = store.glob("attacks/*/outcomes.1.jsonl")
    assert other.read_text() == lines["outcomes.1.jsonl"]


def test_a_process_that_fails_ends_the_job_with_a_sentence(
    world: Path,
    tmp_path: Path,
) -> None:
    command = [*overrides(world, tmp_path / "store"), "eraser=none", "attack=random"]
    command = [argument for argument in command if not argument.startswith(("eraser.", "attack."))]
    store = tmp_path / "store" / "attacks"
    store.parent.mkdir()
    store.write_text("in the way")
    with pytest.raises(ChildProcessError, match=r"Process [01] of 2 failed"):
        run_shared(command, tmp_path / "run")


def test_every_item_is_one_processs() -> None:
    shares = [Processes(index, 3).share("abcdefgh") for index in range(3)]
    assert shares == [["a", "d", "g"], ["b", "e", "h"], ["c", "f"]]
