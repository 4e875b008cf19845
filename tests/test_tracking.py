"""W&B: the mode it takes, what it logs, and that it never stops a job."""

import json
import logging
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attacks.cases import Check, Outcome
from evaluation.statistics import Rate
from experiments.job.cost import Cost
from experiments.job.recording import Off
from experiments.job.result import CaseResult, CurvePoint, Summary
from experiments.results import wandb_process
from experiments.results.grid import draw
from experiments.results.tracking import WandbRecorder, WandbTracker, flat_numbers
from experiments.results.wandb_process import Message, chosen_mode, serve
from tests import tiny_job
from tests.wandb_server import serving

JOB: Any = SimpleNamespace(
    choices={"eraser": "esd", "pruning": "off", "attack": "none", "hydra/help": "concise"},
    concept=SimpleNamespace(name="church"),
    config={"seed": 0, "eraser": {"steps": 3}},
    settings=SimpleNamespace(seed=0),
)


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key and no settings, wherever wandb looks for them."""
    environment = ("API_KEY", "MODE", "DISABLED", "PROJECT", "ENTITY", "DIR", "BASE_URL")
    for name in (*environment, "RUN_ID", "NAME", "RUN_GROUP", "JOB_TYPE", "TAGS", "RESUME"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home"))


def use_everything(recorder: Any, folder: Path) -> None:
    """Call whatever a job calls."""
    image = torch.zeros((3, 8, 8), dtype=torch.uint8)
    outcome = Outcome(0, "a church", "x a church", False, True, 0.9, (Check("a", 3, True, 0.9, None, 8),), 8, image)
    rates = {name: Rate.of([True]) for name in ("base", "erased", "attacked")}
    case = CaseResult.of(outcome, base=True)
    costs = {"attack": Cost(8, 0.1, 10)}
    summary = Summary({}, {}, "church", "none", rates, {"fid": 1.0}, [], costs, {}, {}, [case], JOB.config)
    recorder.hear_loss("training", 1, 0.4)
    recorder.hear_attack("another training", 1, 0.9)
    recorder.hear_attack("attack", 1, 1.0)
    recorder.log_losses([0.4, 0.2])
    recorder.log_curve([CurvePoint(0, 4, 0.0), CurvePoint(1, 8, 1.0)])
    row: Any = SimpleNamespace(prompt="a church")
    draw([row], image[None], image[None], [outcome], [True]).save(folder / "grid.png")
    recorder.log_results(summary, folder / "grid.png", image[None], image[None], [outcome])


def test_off_records_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with Off().start(JOB, folder) as recorder:
        use_everything(recorder, folder)
    assert [path.name for path in folder.iterdir()] == ["grid.png"]


class FakeRun:
    """Keeps what is logged; fails from a given call on."""

    def __init__(self, calls: int = 100) -> None:
        self.calls, self.logged, self.summary, self.exit_code = calls, [], {}, None
        self.url, self.settings, self.artifacts = "https://somewhere/run", SimpleNamespace(sync_dir="folder"), []

    def define_metric(self, *_: Any, **__: Any) -> None:
        pass

    def log(self, data: dict[str, Any]) -> None:
        self.calls -= 1
        if self.calls < 0:
            raise ConnectionError("the server\nis gone")
        self.logged.append(data)

    def log_artifact(self, artifact: Any) -> None:
        self.artifacts.append(artifact)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


class FakeWandb:
    """As much of wandb as is used."""

    Error = ValueError

    def __init__(
        self, run: FakeRun, *, mode: str = "online", key: bool = False, refused: str = "", **told: Any
    ) -> None:
        self.run, self.modes, self.options, self.key, self.refused = run, [], {}, key, refused
        self.told = SimpleNamespace(**{"mode": mode, "project": None, "entity": None, **told})

    def setup(self) -> Any:
        return SimpleNamespace(settings=self.told)

    def login(self, *, verify: bool) -> bool:
        if not self.key:
            raise ValueError("no key")
        return True

    def init(self, mode: str, **options: Any) -> FakeRun:
        self.modes.append(mode)
        self.options = options
        if mode == self.refused:
            raise TimeoutError("no answer")
        return self.run

    class Table:
        def __init__(self, columns: list[str]) -> None:
            self.columns, self.data = columns, []

        def add_data(self, *row: Any) -> None:
            assert len(row) == len(self.columns)
            self.data.append(row)

    class Artifact:
        def __init__(self, name: str, type: str) -> None:
            self.name, self.type, self.files = name, type, []

        def add_file(self, path: str) -> None:
            self.files.append(path)

    @staticmethod
    def Settings(**_: Any) -> None:
        return None

    @staticmethod
    def Image(data: Any) -> Any:
        return data


@pytest.mark.parametrize(
    ("environment", "settings", "key", "wanted", "mode"),
    [
        ({}, "online", False, "auto", "offline"),
        ({}, "online", True, "auto", "online"),
        ({}, "online", False, "online", "online"),
        ({"WANDB_MODE": "offline"}, "offline", True, "online", "offline"),
        ({"WANDB_MODE": "disabled"}, "disabled", True, "auto", "disabled"),
        ({"WANDB_MODE": "online"}, "online", False, "offline", "online"),
        ({"WANDB_DISABLED": "true"}, "online", True, "online", "disabled"),
    ],
)
def test_the_environment_chooses_before_the_config(
    environment: dict[str, str],
    settings: str,
    key: bool,
    wanted: str,
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert chosen_mode(FakeWandb(FakeRun(), mode=settings, key=key), wanted) == mode


def test_a_key_is_found_where_wandb_keeps_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Asked of the library itself, in a process of its own, as it remembers what it was asked first."""
    import subprocess  # noqa: PLC0415

    program = "import wandb; from experiments.results.wandb_process import has_key; print(has_key(wandb))"
    root = Path(__file__).resolve().parents[1]

    def ask() -> str:
        command = [sys.executable, "-c", program]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout.strip()

    assert ask() == "False"
    host = "wandb.example.org"
    monkeypatch.setenv("WANDB_BASE_URL", f"https://{host}")
    monkeypatch.setenv("NETRC", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").write_text(f"machine {host}\n  login user\n  password {'0' * 40}\n")
    (tmp_path / "elsewhere").chmod(0o600)
    assert ask() == "True"


def replayed(wandb: FakeWandb, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is said when a whole job's messages are served."""
    messages: list[Message] = []

    class Kept:
        def __init__(self, _folder: Path) -> None:
            pass

        def send(self, kind: str, payload: Any) -> None:
            messages.append((kind, payload))

        def end(self, _seconds: float) -> None:
            pass

    monkeypatch.setattr("experiments.results.tracking.Courier", Kept)
    with WandbTracker().start(JOB, folder) as recorder:
        use_everything(recorder, folder)
    said: list[dict[str, Any]] = []
    serve(wandb, iter(messages), lambda facts: said.append(dict(facts)))
    return said


def test_curves_numbers_grid_and_prompts_are_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "summary.json").write_text("{}")
    run = FakeRun()
    wandb = FakeWandb(run, key=True, project="the environment's", run_tags=("of mine",))
    said = replayed(wandb, tmp_path, monkeypatch)
    assert said == [{"mode": "online", "url": run.url, "folder": "folder"}, {"ended": True}]
    assert wandb.options["project"] == "the environment's"
    assert (wandb.options["group"], wandb.options["tags"]) == ("church", ("of mine",))
    assert wandb.options["config"]["eraser"] == "esd"
    assert wandb.options["config"]["fields"] == JOB.config
    assert run.exit_code == 0
    losses = [each for each in run.logged if "eraser/loss" in each]
    assert losses == [{"eraser/step": 0, "eraser/loss": 0.4}, {"eraser/step": 1, "eraser/loss": 0.2}]
    assert [each["attack/so_far"] for each in run.logged if "attack/so_far" in each] == [1.0]
    assert {"attack/attempts": 1, "attack/success_rate": 1.0, "attack/unet_evaluations": 8} in run.logged
    assert (run.summary["asr"], run.summary["base"], run.summary["retained_fid"]) == (1.0, 1.0, 1.0)
    assert run.logged[-1]["prompts"].data[0][:5] == ("a church", "x a church", True, False, True)
    assert run.logged[-1]["prompts"].data[0][5].shape == (8, 8, 3)
    assert run.logged[-1]["pictures"] == str(tmp_path / "grid.png")
    assert run.artifacts[0].files == [str(tmp_path / "summary.json")]


def test_losses_and_successes_are_told_while_a_job_runs_and_the_page_goes_with_its_files(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole job: every message in its order, with what the store held when it was sent."""
    sent: list[tuple[str, Any]] = []
    logged: list[tuple[Any, set[str]]] = []

    class Kept:
        def __init__(self, _folder: Path) -> None:
            pass

        def send(self, kind: str, payload: Any) -> None:
            held = {path.parent.parent.name for path in (tmp_path / "store").glob("*/*/result.json")}
            sent.append((kind, payload))
            logged.extend([(payload, held)] if kind == "log" else [])

        def end(self, _seconds: float) -> None:
            pass

    monkeypatch.setattr("experiments.results.tracking.Courier", Kept)
    command = [each for each in tiny_job.overrides(world, tmp_path / "store") if each != "tracker=off"]
    small = ["eraser.steps=3", "prompts=2", "retained=2", "attack.timesteps=1", "attack.steps_per_timestep=1"]
    summary = tiny_job.run([*command, *small], tmp_path / "run")
    losses = [(values["eraser/step"], "edits" in held) for values, held in logged if "eraser/loss" in values]
    assert losses == [(0, False), (1, False), (2, False)]
    names = ["attack/so_far" if "attack/so_far" in values else "attack/attempts" for values, _ in logged[3:5]]
    assert names == ["attack/so_far", "attack/so_far"]
    assert [values["attack/prompts"] for values, _ in logged[3:5]] == [1, 2]
    assert logged[4][0]["attack/so_far"] == summary["rates"]["attacked"]["rate"]
    assert "attack/attempts" in logged[5][0]
    (artifact,) = [payload for kind, payload in sent if kind == "artifact"]
    assert [Path(path).name for path in artifact["files"]] == ["summary.json", "edit.safetensors", "report.html"]
    assert summary["run"] in (tmp_path / "run" / "report.html").read_text()


def test_a_second_training_of_an_eraser_goes_on_where_the_first_ended(tmp_path: Path) -> None:
    sent: list[Any] = []
    courier: Any = SimpleNamespace(send=lambda kind, payload: sent.extend([payload] if kind == "log" else []))
    recorder = WandbRecorder(courier, JOB, WandbTracker(), tmp_path)
    for step in (1, 2, 1, 2, 3):
        recorder.hear_loss("training", step, 0.5)
    recorder.log_losses([0.5] * 6)
    assert [each["eraser/step"] for each in sent] == [0, 1, 2, 3, 4, 5]


def test_a_job_that_is_run_again_has_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = []
    for store in ("one", "other"):
        monkeypatch.setitem(JOB.config, "store", store)
        wandb = FakeWandb(FakeRun())
        replayed(wandb, tmp_path, monkeypatch)
        ids.append(wandb.options["id"])
    monkeypatch.setitem(JOB.config, "seed", 1)
    wandb = FakeWandb(FakeRun())
    replayed(wandb, tmp_path, monkeypatch)
    assert ids[0] == ids[1] != wandb.options["id"]


def test_a_failure_in_the_middle_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = replayed(FakeWandb(FakeRun(1)), tmp_path, monkeypatch)
    assert said[1:] == [{"warning": "W&B stopped recording, the job goes on: the server is gone"}]


def test_an_unreachable_server_means_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb(FakeRun(), key=True, refused="online")
    said = replayed(wandb, tmp_path, monkeypatch)
    assert wandb.modes == ["online", "offline"]
    assert said[0] == {"warning": "W&B cannot go online, recording offline: no answer"}
    assert said[1]["mode"] == "offline"


def test_flat_numbers_can_be_drawn() -> None:
    rate = {"rate": 0.5, "low": 0.1, "high": 0.9, "n": 4, "successes": 2}
    summary = {
        **{"run": "0" * 16, "n": 4, "seed": 0, "rates": {"attacked": rate}},
        "measures": {"fid": 3.0, "clip_score": {"mean": 80.0, "low": 79.0, "high": 81.0, "n": 4}, "kid": None}
        | {"accuracy_style": rate},
        "floor": {"floor": rate, "ceiling": rate, "calibrated": None, "excess": 0.0, "low": -9.0, "high": 9.0}
        | {"verdict": "undecided", "knows": "twin", "runs": {}},
        "costs": {"attack": {"unet_evaluations": 7, "seconds": 1.5}},
    }
    flat = flat_numbers(summary)
    assert (flat["asr"], flat["asr_low"], flat["retained_clip_score"], flat["retained_fid"]) == (0.5, 0.1, 80.0, 3.0)
    assert (flat["asr_floor"], flat["asr_floor_low"], flat["asr_ceiling"], flat["excess"]) == (0.5, 0.1, 0.5, 0.0)
    assert (flat["retained_style"], flat["floor_model"]) == (0.5, "twin")
    assert flat["attack_unet_evaluations"] == 7
    assert all(isinstance(value, (int, float, str)) for value in flat.values())


def test_an_offline_run_lies_in_the_run_folder(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), WandbTracker().start(JOB, tmp_path) as recorder:
        use_everything(recorder, tmp_path)
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    assert list(folder.glob("*.wandb"))
    assert caplog.messages == [f"W&B: recorded in {folder}; send it with `wandb sync {folder}`"]
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_a_run_goes_online_and_one_that_is_repeated_goes_on_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Against a server of our own, by wandb's own code."""
    (tmp_path / "summary.json").write_text('{"a": 1}')
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_RUN_GROUP", "mine")
        for _ in range(2):
            caplog.clear()
            with caplog.at_level(logging.INFO), WandbTracker(patience=90).start(JOB, tmp_path) as recorder:
                use_everything(recorder, tmp_path)
            ((run, told),) = server.runs.items()
            address = f"{server.address}/me/proj/runs/{run}"
            assert caplog.messages == [
                f"W&B: online, pictures and prompts are uploaded to {address}",
                f"W&B: {address}",
            ]
    config = {name: value["value"] for name, value in json.loads(told["config"]).items() if name != "_wandb"}
    assert (config["eraser"], config["attack"], config["combination"]) == ("esd", "none", "esd / off / none")
    assert (told["groupName"], told["jobType"]) == ("mine", "none") and "pruning=off" in told["tags"]
    history = server.streamed(run, "wandb-history.jsonl")
    assert [line["eraser/loss"] for line in history if "eraser/loss" in line][:2] == [0.4, 0.2]
    assert next(line["attack/so_far"] for line in history if "attack/so_far" in line) == 1
    summary = json.loads(server.uploads["wandb-summary.json"])
    assert (summary["asr"], summary["erased"], summary["retained_fid"]) == (1, 1, 1)
    assert server.uploads["summary.json"] == b'{"a": 1}'
    assert {artifact["artifactTypeName"] for artifact in server.artifacts} == {"run_table", "result"}


def test_disabled_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    folder = tmp_path / "run"
    folder.mkdir()
    with WandbTracker().start(JOB, folder) as recorder:
        use_everything(recorder, folder)
    assert not list(folder.rglob("*.wandb"))


def test_an_error_of_the_job_passes_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError), WandbTracker().start(JOB, tmp_path):
        raise ZeroDivisionError


def test_a_server_that_never_answers_holds_up_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It takes every connection and says nothing, as a dying server does."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken: list[socket.socket] = []

        def take() -> None:
            while True:
                try:
                    taken.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=take, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        began = time.monotonic()
        with caplog.at_level(logging.INFO), WandbTracker(patience=5.0).start(JOB, tmp_path) as recorder:
            use_everything(recorder, tmp_path)
        assert time.monotonic() - began < wandb_process.START_SECONDS
        assert any("did not come to an end within 5 s" in message for message in caplog.messages)
        for connection in taken:
            connection.close()
