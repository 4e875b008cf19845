"""The W&B dashboard: what it charts, that those numbers are recorded, and that a server is sent it."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.command.dashboard_command import dashboard
from experiments.command.errors import CommandError
from experiments.results import wandb_process
from experiments.results.tracking import flat_numbers
from tests.tiny_job import CONFIG_FOLDER
from tests.wandb_server import serving

pytest.importorskip("wandb_workspaces")

from experiments.results.dashboard import BESIDE, make_report, make_workspace

TABLE = "| attack | ASR |\n|---|---|\n| random | 12 % |\n"


def specification(made: Any) -> dict[str, Any]:
    return json.loads(made._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))  # type: ignore[no-any-return]


def panels(spec: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    sections = spec["section"]["panelBankConfig"]["sections"]
    return {
        section["name"]: [panel["config"] | {"kind": panel["viewType"]} for panel in section["panels"]]
        for section in sections
    }


def test_the_workspace_charts_success_over_every_choice_what_it_costs_curves_and_pictures() -> None:
    spec = specification(make_workspace("me", "proj", "mine", "church"))
    success, costs, curves, pictures = panels(spec).values()
    grouped = {panel["groupBy"] for panel in success if panel["kind"] == "Bar Chart"}
    assert grouped == {f"{choice}.value" for choice in ("eraser", "pruning", "attack", "combination")}
    assert all("asr" in panel["metrics"] for panel in success if panel["kind"] == "Bar Chart")
    assert any("asr_floor" in panel.get("metrics", []) for panel in success)
    assert {panel["xAxis"] for panel in costs} == {f"summary:{name}" for name in BESIDE}
    assert {panel["yAxis"] for panel in costs} == {"summary:asr"}
    assert {(panel["xAxis"], *panel["metrics"]) for panel in curves} == {
        ("attack/attempts", "attack/success_rate"),
        ("attack/unet_evaluations", "attack/success_rate"),
        ("attack/prompts", "attack/so_far"),
        ("eraser/step", "eraser/loss"),
    }
    assert "pictures" in json.dumps(pictures) and "prompts" in json.dumps(pictures)
    (runs,) = spec["section"]["runSets"]
    assert "church" in json.dumps(runs["filters"])
    assert [key["name"] for key in runs["grouping"]] == ["eraser.value", "pruning.value", "attack.value"]


def test_what_is_charted_is_what_runs_record() -> None:
    rate = {"rate": 0.5, "low": 0.1, "high": 0.9, "n": 4, "successes": 2}
    flat = flat_numbers(
        {
            **{"run": "0", "n": 4, "seed": 0, "costs": {}, "rates": {"attacked": rate, "erased": rate}},
            "measures": {"accuracy_style": rate, "accuracy_subject": rate, "clip_score": rate, "fid": 3.0},
            "floor": {"floor": rate, "ceiling": rate, "calibrated": None, "excess": 0.0, "low": 0.0, "high": 0.0}
            | {"verdict": "", "knows": "", "runs": {}},
        }
    )
    charted = set(re.findall(r'"summary:(\w+)"', json.dumps(specification(make_workspace("me", "proj", "mine")))))
    assert charted >= {"asr", "excess", *BESIDE}
    assert charted <= flat.keys()


def test_a_report_has_the_table_and_the_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its run sets ask the server for the project's number when they are written.
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        told = json.dumps(specification(make_report("me", "proj", "mine", [("table1", TABLE)])))
    assert json.dumps(TABLE)[1:-1] in told
    assert "table1" in told and "attack/success_rate" in told and "summary:retained_style" in told


def test_the_command_sends_both_and_says_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "table1.md").write_text(TABLE)
    line = [sys.executable, "-m", "experiments.command.console", "dashboard", str(tmp_path / "table1.md")]
    monkeypatch.setenv("PYTHONPATH", str(CONFIG_FOLDER.parent))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_PROJECT", "proj")
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    workspace, report = server.views
    assert (workspace["entityName"], workspace["projectName"]) == (report["entityName"], report["projectName"])
    assert workspace["projectName"] == "proj"
    assert "attack/success_rate" in workspace["spec"] and "12 %" in report["spec"]
    shown = done.stdout.splitlines()
    assert len(shown) == 2 and all(address.startswith(f"{server.address}/me/proj") for address in shown)


def test_without_a_key_it_says_what_to_do_and_can_be_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_process, "has_key", lambda _: False)
    with pytest.raises(CommandError, match="W&B has no key here; `wandb login` keeps one, and --spec FILE"):
        dashboard()
    with pytest.raises(CommandError, match=r"There is no table nothing\.md"):
        dashboard([Path("nothing.md")])
    dashboard(spec=tmp_path / "spec.json", project="proj", entity="me")
    assert panels(json.loads((tmp_path / "spec.json").read_text())["workspace"])
