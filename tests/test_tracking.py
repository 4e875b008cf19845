"""W&B: the mode it takes, what it logs, and that it never stops a job."""

import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attacks.cases import Check, Outcome
from evaluation.statistics import Rate
from experiments.job.cost import Cost
from experiments.job.summary import CaseResult, CurvePoint, Summary
from experiments.results.grid import draw
from experiments.results.tracking import Off, WandbTracker, has_key

JOB: Any = SimpleNamespace(
    choices={"eraser": "esd", "pruning": "off", "attack": "none", "hydra/help": "concise"},
    concept=SimpleNamespace(name="church"),
    config={"seed": 0, "eraser": {"steps": 3}},
    settings=SimpleNamespace(seed=0),
)


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def use_everything(recorder: Any, folder: Path) -> None:
    """Call whatever a job calls."""
    image = torch.zeros((3, 8, 8), dtype=torch.uint8)
    outcome = Outcome(0, "a church", "x a church", False, True, 0.9, (Check("a", 3, True, 0.9, None, 8),), 8, image)
    rates = {name: Rate.of([True]) for name in ("base", "erased", "attacked")}
    case = CaseResult.of(outcome, base=True)
    costs = {"attack": Cost(8, 0.1, 10)}
    summary = Summary({}, {}, "church", "none", rates, {"fid": 1.0}, [], costs, {}, {}, [case], JOB.config)
    recorder.log_losses([0.3, 0.2])
    recorder.log_curve([CurvePoint(0, 4, 0.0), CurvePoint(1, 8, 1.0)])
    row: Any = SimpleNamespace(prompt="a church")
    draw([row], image[None], image[None], [outcome], [True]).save(folder / "grid.png")
    recorder.log_results(summary, folder / "grid.png", image[None], image[None], [outcome])


def test_auto_is_offline_without_a_key_and_online_with_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert WandbTracker().resolved_mode() == "offline"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert WandbTracker().resolved_mode() == "online"
    assert WandbTracker(mode="offline").resolved_mode() == "offline"
    (tmp_path / ".netrc").write_text("machine example.org login user password secret\n")
    assert not has_key()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert WandbTracker().resolved_mode() == "online"


def test_off_records_nothing(tmp_path: Path) -> None:
    with Off().start(JOB, tmp_path) as recorder:
        use_everything(recorder, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


class FakeRun:
    """Keeps what is logged; fails from a given call on."""

    def __init__(self, calls: int) -> None:
        self.calls, self.logged, self.summary, self.exit_code = calls, [], {}, None

    def define_metric(self, *_: Any, **__: Any) -> None:
        pass

    def log(self, data: dict[str, Any]) -> None:
        self.calls -= 1
        if self.calls < 0:
            raise ConnectionError("the server\nis gone")
        self.logged.append(data)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


def fake_wandb(
    monkeypatch: pytest.MonkeyPatch, run: FakeRun, modes: list[str], refused: set[str] = frozenset()
) -> None:
    def init(mode: str, **_: Any) -> FakeRun:
        modes.append(mode)
        if mode in refused:
            raise TimeoutError("no answer")
        return run

    class Table:
        def __init__(self, columns: list[str]) -> None:
            self.columns, self.data = columns, []

        def add_data(self, *row: Any) -> None:
            assert len(row) == len(self.columns)
            self.data.append(row)

    module = SimpleNamespace(init=init, Settings=lambda **_: None, Table=Table, Image=lambda data: data)
    monkeypatch.setitem(sys.modules, "wandb", module)


def test_curves_numbers_grid_and_prompts_are_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, modes = FakeRun(100), []
    fake_wandb(monkeypatch, run, modes)
    with WandbTracker().start(JOB, tmp_path) as recorder:
        use_everything(recorder, tmp_path)
    assert modes == ["offline"]
    assert run.exit_code == 0
    assert {"eraser/step": 1, "eraser/loss": 0.2} in run.logged
    assert {"attack/attempts": 1, "attack/success_rate": 1.0, "attack/unet_evaluations": 8} in run.logged
    assert run.summary["rates"]["base"]["rate"] == 1.0
    assert run.logged[-1]["prompts"].data[0][:5] == ("a church", "x a church", True, False, True)
    assert run.logged[-1]["pictures"] == str(tmp_path / "grid.png")


def test_a_failure_in_the_middle_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_wandb(monkeypatch, FakeRun(1), [])
    with caplog.at_level(logging.WARNING), WandbTracker().start(JOB, tmp_path) as recorder:
        use_everything(recorder, tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        "W&B stopped recording, the job goes on: the server is gone"
    ]


def test_an_absent_wandb_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with caplog.at_level(logging.WARNING), WandbTracker().start(JOB, tmp_path) as recorder:
        use_everything(recorder, tmp_path)
    assert len(caplog.records) == 1


def test_an_unreachable_server_means_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    modes: list[str] = []
    fake_wandb(monkeypatch, FakeRun(100), modes, refused={"online"})
    with caplog.at_level(logging.WARNING), WandbTracker(mode="online").start(JOB, tmp_path) as recorder:
        use_everything(recorder, tmp_path)
    assert modes == ["online", "offline"]
    assert "recording offline" in caplog.records[0].getMessage()


def test_an_error_of_the_job_passes_through_and_marks_the_run_as_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FakeRun(100)
    fake_wandb(monkeypatch, run, [])
    with pytest.raises(ZeroDivisionError), WandbTracker().start(JOB, tmp_path):
        raise ZeroDivisionError
    assert run.exit_code == 1


def test_an_offline_run_lies_in_the_run_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wandb")
    with WandbTracker().start(JOB, tmp_path) as recorder:
        use_everything(recorder, tmp_path)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
