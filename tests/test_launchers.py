"""Sweeps side by side: one job that fails, one that is killed, the closing words, and the same command once more."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from experiments.job.store import read_json
from tests import fake_slurm
from tests.tiny_job import overrides

ROOT = Path(__file__).resolve().parents[1]

ATTACK = '''
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from attacks.none import NoAttack


@dataclass(frozen=True)
class Trial(NoAttack):
    """Plain prompts; one job of the sweep cannot be done, and one is killed the first time."""

    fails: int
    dies: int
    marker: str

    def run(self, model, cases, judge, **named):
        number = HydraConfig.get().job.num
        if number == self.fails:
            raise ValueError(f"trial cannot attack in job {number + 1}.")
        if number == self.dies and not Path(self.marker).exists():
            Path(self.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        yield from super().run(model, cases, judge, **named)
'''


def plugin(folder: Path, *, fails: int, dies: int) -> Path:
    """The attack above as a plugin."""
    (folder / "conf" / "attack").mkdir(parents=True)
    (folder / "trial.py").write_text(ATTACK)
    (folder / "conf" / "attack" / "trial.yaml").write_text(
        f"_target_: trial.Trial\nfails: {fails}\ndies: {dies}\nmarker: {folder / 'was_killed'}\n"
    )
    return folder


def sweep(launcher: str, folder: Path, world: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``run.py -m`` with what a small job needs, in a process of its own."""
    base = [part for part in overrides(world, folder / "store") if not part.startswith(("attack.", "eraser."))]
    few = ["eraser=none", "prompts=2", "retained=2", f"hydra.sweep.dir={folder / 'sweep'}"]
    command = [sys.executable, "run.py", "-m", f"plugins={folder / 'plugin'}", f"hydra/launcher={launcher}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if launcher == "submitit_slurm":
        fake_slurm.install(folder / "bin")
        (folder / "slurm").mkdir(exist_ok=True)
        environment |= {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "FAKE_SLURM": str(folder / "slurm")}
    return subprocess.run(
        [*command, *base, *few, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def rows(out: str) -> list[str]:
    """The runs in the closing table."""
    closing = out[out.rindex("All runs") :]
    return re.findall(r"\b([0-9a-f]{16}) │", closing)


def check_sweep(launcher: str, folder: Path, world: Path, seeds: int, *arguments: str) -> None:
    """Sweep over pruning, a union and seeds; the second job fails, and the last but one is killed."""
    count = 4 * seeds
    plugin(folder / "plugin", fails=1, dies=count - 2)
    asked = ["pruning=off,magnitude", "attack=trial,[trial,seed_search]", f"seed={','.join(map(str, range(seeds)))}"]
    first = sweep(launcher, folder, world, *asked, *arguments)
    (folder / "first.out").write_text(first.stdout + first.stderr)
    assert first.returncode == 1, first.stderr[-4000:]
    told = first.stderr.strip().splitlines()
    assert told[-1] == f"2 of {count} jobs failed, as said above; the same command runs them again."
    assert told[-3].startswith("Job 2 failed (")
    assert told[-3].endswith("trial cannot attack in job 2.")
    assert told[-2].startswith(f"Job {count - 1} failed (")
    assert "It ended without a word: " in told[-2]
    assert len(rows(first.stdout)) == count - 2
    logs = [(folder / "sweep" / str(number) / "run.log").read_text() for number in range(count)]
    assert all(f"[{number}/{count}]" in line for number, log in enumerate(logs, 1) for line in log.splitlines()[:3])
    # What the others made is found again, and the one that was killed goes on.
    second = sweep(launcher, folder, world, *asked, *arguments)
    (folder / "second.out").write_text(second.stdout + second.stderr)
    assert second.stderr.strip().splitlines()[-1].startswith(f"1 of {count} jobs failed")
    assert len(rows(second.stdout)) == count - 1
    assert set(rows(first.stdout)) < set(rows(second.stdout))
    pairs = 2 * seeds - 1
    assert second.stdout.count("pruning=magnitude minus pruning=off") == 2 * pairs
    records = [read_json(path) for path in (folder / "sweep" / "jobs").glob("*.json")]
    assert sum(record["failure"] is None for record in records) == count - 1
    assert not list((folder / "store").rglob(".lease"))


def test_a_small_sweep_by_joblib(world: Path, tmp_path: Path) -> None:
    check_sweep("joblib", tmp_path, world, 1, "hydra.launcher.n_jobs=2")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["submitit_local", "submitit_slurm", "ray"])
def test_a_small_sweep(launcher: str, world: Path, tmp_path: Path) -> None:
    if launcher == "ray" and find_spec("ray") is None:
        pytest.skip("Ray is not installed; pip install '.[ray]'.")
    check_sweep(launcher, tmp_path, world, 1)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "ray"])
def test_a_sweep_of_24_jobs(launcher: str, world: Path, tmp_path: Path) -> None:
    if launcher == "ray" and find_spec("ray") is None:
        pytest.skip("Ray is not installed; pip install '.[ray]'.")
    check_sweep(launcher, tmp_path, world, 6)
