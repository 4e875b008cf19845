"""Two machines on one store: every artefact is made once, whoever comes first."""

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from experiments.job.store import read_json

ROOT = Path(__file__).resolve().parents[1]

MACHINES = ("first", "second")

MADE_ONCE = ("result.json", "edit.safetensors", ".png")
"""How the files end that a stage's work becomes; a run's summary is written by every job that ends."""


def jobs(world: Path, store: object) -> list[list[str]]:
    """Sixteen jobs that share pictures, edits and attacks."""
    from tests.tiny_job import overrides  # noqa: PLC0415

    base = [part for part in overrides(world, Path("store")) if not part.startswith(("attack.", "eraser.", "store="))]
    base += [f"store={store}", "eraser=none", "retained=2", "attack=seed_search", "attack.tries=2"]
    varied = [
        [f"pruning={pruning}", f"prompts={prompts}", f"seed={seed}"]
        for pruning in ("off", "magnitude")
        for prompts in (2, 4)
        for seed in (0, 1, 2, 3)
    ]
    return [[*base, *one] for one in varied]


def work_as(every: int, machine: str, world: Path, shared: Path) -> None:
    """Do each ``every``-th of the jobs under the name of a machine, and write down each file made."""
    import socket  # noqa: PLC0415

    socket.gethostname = lambda: machine
    from experiments.job.journal import Journal  # noqa: PLC0415
    from tests.tiny_job import run  # noqa: PLC0415

    log = shared / f"{machine}.log"
    replace, append = Path.replace, Journal.append

    def note(what: str) -> None:
        with log.open("a") as file:
            file.write(f"{what}\n")

    def replaced(self: Path, target: Path) -> Path:
        note(str(target))
        return replace(self, target)

    def appended(self: Journal, entry: Any) -> None:
        note(f"{self.path} {entry['id']}")
        append(self, entry)

    Path.replace, Journal.append = replaced, appended  # type: ignore[method-assign,assignment]
    (shared / f"{machine}.ready").touch()
    while len(list(shared.glob("*.ready"))) < 2:
        time.sleep(0.001)
    for number, job in enumerate(jobs(world, shared / "store")[::every]):
        run(job, shared / machine / str(number))


def by_fork_server(every: int, world: Path, shared: Path) -> list[int | None]:
    """The exit statuses of two machines that one process has imported the packages for."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.tiny_job"])
    processes = [context.Process(target=work_as, args=(every, machine, world, shared)) for machine in MACHINES]
    for process in processes:
        process.start()
    for process in processes:
        process.join(1200)
    return [process.exitcode for process in processes]


def by_processes(every: int, world: Path, shared: Path) -> list[int | None]:
    """The same of two that share nothing but the store: each has its own caches."""
    processes = []
    for machine in MACHINES:
        caches = {name: str(shared / machine / name) for name in ("XDG_CACHE_HOME", "HF_HOME", "TORCH_HOME")}
        arguments = f"{every}, {machine!r}, *map(Path, {[str(world), str(shared)]!r})"
        program = f"from pathlib import Path\nfrom tests.test_shared_store import work_as\nwork_as({arguments})"
        environment = {**os.environ, **caches, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", program]
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL))
    return [process.wait(timeout=1200) for process in processes]


@pytest.mark.parametrize(
    ("every", "started"), [(4, by_fork_server), pytest.param(1, by_processes, marks=pytest.mark.slow)]
)
def test_two_machines_make_each_artefact_once(
    every: int, started: Callable[[int, Path, Path], list[int | None]], world: Path, tmp_path: Path
) -> None:
    assert started(every, world, tmp_path) == [0, 0]
    made = [(tmp_path / f"{machine}.log").read_text().splitlines() for machine in MACHINES]
    kept = [[line for line in lines if line.startswith(str(tmp_path / "store"))] for lines in made]
    counted = Counter(line for lines in kept for line in lines if line.endswith(MADE_ONCE) or ".jsonl " in line)
    twice = {line: times for line, times in counted.items() if times > 1}
    assert not twice
    shares = [sum(line in counted for line in lines) for lines in kept]
    # Over many jobs both worked: neither only found what the other had made.
    assert sum(shares) == len(counted)
    assert every > 1 or min(shares) > 0
    assert len(counted) > 80 / every
    print(f"{len(counted)} artefact files, made by the two: {shares}")
    summaries = [
        [read_json(tmp_path / machine / str(number) / "summary.json") for number in range(16 // every)]
        for machine in MACHINES
    ]
    for one, other in zip(*summaries, strict=True):
        assert one["run"] == other["run"]
        assert one["cases"] == other["cases"]
    assert not list((tmp_path / "store").rglob(".lease"))
