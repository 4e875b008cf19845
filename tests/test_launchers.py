"""Sweeps side by side: one job that fails, one that is killed, the closing words, and the same command once more."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from experiments import CONFIG_FOLDER
from experiments.command.engines import Joblib, Ray, SubmititSlurm
from experiments.command.errors import CommandError
from experiments.command.launchers import check_launcher
from experiments.job.store import read_json
from tests import fake_slurm
from tests.light_calls import Answer, Killed, Seen
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
    seed: int

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
        # So that no other job makes what these two would find.
        "seed: ${seed}\n"
    )
    return folder


@dataclasses.dataclass(frozen=True)
class Said:
    """What a command came to."""

    stdout: str
    stderr: str
    returncode: int


def sweeps(launcher: str, folder: Path, world: Path, *arguments: str, by_one: bool) -> Iterator[Said]:
    """``run.py -m`` with what a small job needs, and the same command again: in a process each, or ``by_one``."""
    base = [part for part in overrides(world, folder / "store") if not part.startswith(("attack.", "eraser."))]
    few = ["eraser=none", "prompts=2", "retained=2", f"hydra.sweep.dir={folder / 'sweep'}"]
    asked = ["-m", f"plugins={folder / 'plugin'}", f"hydra/launcher={launcher}", *base, *few, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if launcher == "submitit_slurm" and not fake_slurm.real():
        fake_slurm.install(folder / "bin")
        (folder / "slurm").mkdir(exist_ok=True)
        environment |= {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "FAKE_SLURM": str(folder / "slurm")}
    if by_one:
        command = [sys.executable, "-m", "tests.twice", str(folder), *asked]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        for name in ("first", "second"):
            out, err, status = (folder.joinpath(f"{name}.{of}").read_text() for of in ("stdout", "stderr", "status"))
            yield Said(out, err, int(status))
        return
    for name in ("first", "second"):
        command = [sys.executable, "run.py", *asked]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        for of, text in (("stdout", done.stdout), ("stderr", done.stderr)):
            (folder / f"{name}.{of}").write_text(text)
        yield Said(done.stdout, done.stderr, done.returncode)


def rows(out: str) -> list[str]:
    """The runs in the closing table."""
    closing = out[out.rindex("All runs") :]
    return re.findall(r"\b([0-9a-f]{16}) │", closing)


def log_of(folder: Path, number: int) -> str:
    """What the log of a job says, of both times that it ran; jobs are counted from 1."""
    return (folder / "sweep" / str(number - 1) / "run.log").read_text()


def last_log_of(folder: Path, number: int) -> str:
    """The same of the last time."""
    return log_of(folder, number).rpartition("] model: ")[2]


def check_sweep(launcher: str, folder: Path, world: Path, seeds: int, *arguments: str, by_one: bool = False) -> None:
    """Sweep over pruning, a union and seeds; the second job fails, and the last but one is killed."""
    count = 4 * seeds
    plugin(folder / "plugin", fails=1, dies=count - 2)
    asked = ["pruning=off,magnitude", "attack=trial,[trial,seed_search]", f"seed={','.join(map(str, range(seeds)))}"]
    said = sweeps(launcher, folder, world, *asked, *arguments, by_one=by_one)
    first = next(said)
    assert first.returncode == 1, first.stderr[-4000:]
    told = first.stderr.strip().splitlines()
    assert told[-1] == f"2 of {count} jobs failed, as said above; the same command runs them again."
    assert told[-3].startswith("Job 2 failed (")
    assert told[-3].endswith("trial cannot attack in job 2.")
    assert told[-2].startswith(f"Job {count - 1} failed (")
    assert "It ended without a word: " in told[-2]
    assert len(rows(first.stdout)) == count - 2
    assert all(
        f"[{number}/{count}]" in line
        for number in range(1, count + 1)
        for line in log_of(folder, number).splitlines()[:3]
    )
    # What the others made is found again, and the one that was killed goes on.
    second = next(said)
    assert second.stderr.strip().splitlines()[-1].startswith(f"1 of {count} jobs failed")
    assert len(rows(second.stdout)) == count - 1
    assert set(rows(first.stdout)) < set(rows(second.stdout))
    pairs = 2 * seeds - 1
    assert second.stdout.count("pruning=magnitude minus pruning=off") == 2 * pairs
    again = [
        number
        for number in range(1, count + 1)
        if any(found != "2" for found in re.findall(r"attack: (\d) of 2 prompts found", last_log_of(folder, number)))
    ]
    assert again == [2, count - 1]
    records = [read_json(path) for path in (folder / "sweep" / "jobs").glob("*.json")]
    assert sum(record["failure"] is None for record in records) == count - 1
    assert not list((folder / "store").rglob(".lease"))


def test_a_small_sweep_by_joblib(world: Path, tmp_path: Path) -> None:
    check_sweep("joblib", tmp_path, world, 1, "hydra.launcher.n_jobs=2", by_one=True)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["submitit_local", "submitit_slurm", "ray"])
def test_a_small_sweep(launcher: str, world: Path, tmp_path: Path) -> None:
    if launcher == "ray" and find_spec("ray") is None:
        pytest.skip("Ray is not installed; pip install '.[ray]'.")
    check_sweep(launcher, tmp_path, world, 1, *(["hydra.launcher.cpus_per_task=1"] * (launcher == "submitit_slurm")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "at_once"),
    [
        ("joblib", ["hydra.launcher.n_jobs=3"]),
        ("submitit_local", ["hydra.launcher.jobs_at_once=5"]),
        ("ray", ["hydra.launcher.remote.max_calls=0"]),
    ],
)
def test_a_sweep_of_24_jobs(launcher: str, at_once: list[str], world: Path, tmp_path: Path) -> None:
    if launcher == "ray" and find_spec("ray") is None:
        pytest.skip("Ray is not installed; pip install '.[ray]'.")
    check_sweep(launcher, tmp_path, world, 6, *at_once)


def composed(*arguments: str) -> DictConfig:
    """What Hydra makes of a command, with its own settings."""
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        return compose("config", list(arguments), return_hydra_config=True)


@pytest.mark.parametrize(
    ("preset", "engine", "settings"),
    [
        ("gpu_each", Joblib, {"jobs_per_gpu": 1}),
        ("gpu_shared", Joblib, {"jobs_per_gpu": 3}),
        ("ray_gpu_each", Ray, {"remote": {"num_cpus": 4, "num_gpus": 1, "max_retries": 0, "max_calls": 1}}),
        ("ray_gpu_shared", Ray, {"remote": {"num_cpus": 2, "num_gpus": 0.33, "max_retries": 0, "max_calls": 1}}),
        ("slurm_gpu_each", SubmititSlurm, {"gpus_per_node": 1, "mem_gb": 32.0}),
        ("slurm_gpu_shared", SubmititSlurm, {"gpus_per_node": None, "gres": "shard:1"}),
        ("slurm_array", SubmititSlurm, {"array_parallelism": 32, "cpus_per_task": 1}),
    ],
)
def test_presets_compose(
    preset: str, engine: type, settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.command.engines._gpus", lambda: ["0", "1"])
    launcher = composed(f"+launcher_presets={preset}", "hydra.job.num=0", "hydra.job.name=run").hydra.launcher
    OmegaConf.set_struct(launcher, False)
    launcher.submitit_folder = "submitit"
    fields = {field.name for field in dataclasses.fields(engine)}
    made = engine(
        **{key: value for key, value in OmegaConf.to_container(launcher, resolve=True).items() if key in fields}
    )
    assert {name: getattr(made, name) for name in settings} == settings


def test_every_preset_is_tested() -> None:
    tested = {mark.args[1][place][0] for mark in test_presets_compose.pytestmark for place in range(len(mark.args[1]))}
    assert tested == {path.stem for path in (CONFIG_FOLDER / "launcher_presets").glob("*.yaml")}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=0"], "hydra.launcher.n_jobs is 0; it must be"),
        (
            ["hydra/launcher=joblib", "hydra.launcher.n_jobs=two"],
            "hydra.launcher.n_jobs is 'two'; it must be an integer",
        ),
        (["hydra/launcher=joblib", "hydra.launcher.jobs_per_gpu=2"], "jobs_per_gpu is 2, but there is no GPU here"),
        (["hydra/launcher=submitit_local", "hydra.launcher.jobs_at_once=0"], "hydra.launcher.jobs_at_once is 0"),
    ],
)
def test_a_wrong_setting_is_refused_first(arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.command.engines._gpus", lambda: [])
    config = composed(*arguments, "hydra.sweep.dir=sweep")
    with pytest.raises(CommandError, match=re.escape(sentence)):
        check_launcher(config)


@pytest.mark.parametrize(("launcher", "extra"), [("joblib", "joblib"), ("submitit_slurm", "slurm"), ("ray", "ray")])
def test_a_missing_extra_is_named(launcher: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.command.launchers.find_spec", lambda name: None)
    config = composed(f"hydra/launcher={launcher}", "hydra.sweep.dir=sweep", "hydra.job.name=run")
    with pytest.raises(CommandError, match=re.escape(f"which is not installed: pip install '.[{extra}]'")):
        check_launcher(config)


def test_gpus_are_handed_out_to_so_many_jobs_each(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("experiments.command.engines._gpus", lambda: ["3", "5"])
    monkeypatch.setattr(Joblib, "preload", "json")
    ends = Joblib(n_jobs=-1, jobs_per_gpu=2).run([Seen(tmp_path, number) for number in range(6)])
    assert [end.died for end in ends] == [""] * 6
    seen = [end.value for end in ends]
    assert set(seen) == {"3", "5"}
    most = dict.fromkeys(seen, 0)
    for path in tmp_path.glob("*.json"):
        told = json.loads(path.read_text())
        most[told["gpu"]] = max(most[told["gpu"]], told["beside"])
    assert all(count <= 2 for count in most.values())


@pytest.mark.parametrize("how", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_jobs_end_with_the_command(how: signal.Signals, tmp_path: Path) -> None:
    program = (
        "from pathlib import Path\nfrom experiments.command.engines import Joblib\n"
        "from experiments.command.errors import one_sentence, stop_on_sigterm\n"
        "from tests.light_calls import Sleeper\nJoblib.preload = 'json'\n"
        "with one_sentence(), stop_on_sigterm():\n"
        f"    Joblib(n_jobs=2, jobs_per_gpu=None).run([Sleeper(Path({str(tmp_path)!r}))] * 3)\n"
    )
    main = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while len(workers := list(tmp_path.glob("*.pid"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    main.send_signal(how)
    _, err = main.communicate(timeout=120)
    if how == signal.SIGTERM:
        assert err.endswith("Stopped by SIGTERM; the same command continues where it stopped.\n")
        assert main.returncode == 143
    while any(Path(f"/proc/{worker.stem}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_ray_tells_which_of_its_jobs_died() -> None:
    pytest.importorskip("ray", reason="Ray is not installed; pip install '.[ray]'.")
    init = {"address": "local", "num_cpus": 2, "include_dashboard": False}
    remote = {"num_cpus": 1, "max_retries": 0, "max_calls": 1}
    ends = Ray(init=init, remote=remote).run([Answer("a"), Killed(), Answer("c")])
    assert [end.value for end in ends] == ["a", None, "c"]
    assert [bool(end.died) for end in ends] == [False, True, False]


def test_ray_that_lets_nobody_in_is_told_with_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379.")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init))
    with pytest.raises(CommandError, match=r"at 10\.0\.0\.1:6379; a cluster that asks .* RAY_AUTH_MODE=token, and its"):
        Ray(init={"address": "10.0.0.1:6379"}, remote={}).run([])
    with pytest.raises(CommandError, match=r"at 10\.0\.0\.1:6379\.$"):
        Ray(init={"address": "local"}, remote={}).run([])


@pytest.mark.slow
def test_jobs_run_on_a_ray_cluster_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed; pip install '.[ray]'.")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "start", "--head", "--block", "--port=6391", "--num-cpus=2", "--include-dashboard=false"]
    cluster = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert cluster.stdout is not None
        assert any("--block" in line for line in cluster.stdout)
        init = {"address": "127.0.0.1:6391", "num_cpus": None, "include_dashboard": False}
        ends = Ray(init=init, remote={"num_cpus": 1, "max_retries": 0, "max_calls": 1}).run([Answer("a"), Killed()])
    finally:
        cluster.terminate()
        cluster.wait(60)
    assert [end.value for end in ends] == ["a", None]
    assert ends[1].died
