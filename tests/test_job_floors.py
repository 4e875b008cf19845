"""A job's floor and ceiling: the same attack on the twin and on the unedited model, each made once."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attacks.cases import PromptCase
from diffusion.model import TextToImage
from evaluation.floors import AboveFloor
from evaluation.savings import NEVER, Savings
from evaluation.statistics import Rate
from experiments.command.errors import CommandError
from experiments.job import floors, stages
from experiments.job.store import read_json
from experiments.results import tables
from experiments.results.floors import floor_sections, floor_table, trainings_table
from experiments.results.tracking import flat_numbers
from tests import tiny_job
from tests.night import all_but
from tests.test_processes import run_shared

COMMAND = ["concept=church", "prompts=4", "attack.timesteps=2", "attack.steps_per_timestep=1"]


@pytest.fixture
def arguments(canvas: Path, twins: Path, tmp_path: Path) -> list[str]:
    """The command line of a small job on the tiny canvas, without its eraser."""
    return [*tiny_job.canvas_overrides(canvas, twins, tmp_path), *COMMAND]


@pytest.fixture(scope="module")
def store_with_uce(canvas: Path, twins: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with that job of UCE's."""
    folder = tmp_path_factory.mktemp("uce")
    tiny_job.run([*tiny_job.canvas_overrides(canvas, twins, folder), *COMMAND, "eraser=uce"], folder / "uce")
    return folder / "store"


@pytest.fixture
def uce_in_store(store_with_uce: Path, tmp_path: Path) -> None:
    """UCE's job need not be worked on again."""
    shutil.copytree(store_with_uce, tmp_path / "store")


@pytest.fixture
def spent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The U-Net evaluations of every model that is loaded, in the end."""
    models: list[TextToImage] = []
    load = floors.CanvasSource.load

    def remembered(self: floors.CanvasSource) -> TextToImage:
        models.append(load(self))
        return models[-1]

    monkeypatch.setattr(floors.CanvasSource, "load", remembered)
    return models  # type: ignore[return-value]


ESD = ["eraser=esd", "eraser.steps=2", "eraser.batch_size=2", "eraser.sampling_steps=2"]


def attacked(summary: dict[str, Any]) -> list[bool]:
    return [case["attacked"] for case in summary["cases"]]


def test_floor_and_ceiling_are_the_jobs_of_the_twin_and_of_the_unedited_model(
    arguments: list[str], tmp_path: Path, spent: list[TextToImage]
) -> None:
    summary = tiny_job.run([*arguments, *ESD], tmp_path / "esd")
    # One model serves all three.
    assert len(spent) == 1
    block = summary["floor"]
    assert block["knows"] == "never_church"
    store = tmp_path / "store" / "runs"
    made = {name: read_json(store / run / "summary.json") for name, run in block["runs"].items()}

    by_hand = {
        "floor": tiny_job.run([*arguments, "eraser=retrained", "floor=off"], tmp_path / "floor"),
        "ceiling": tiny_job.run([*arguments, "eraser=none", "floor=off"], tmp_path / "ceiling"),
    }
    # Neither was worked on again, and both are what a user's command would have made.
    assert [model.unet_evaluations for model in spent[1:]] == [0, 0]
    for name, run in by_hand.items():
        assert (run["run"], run["choices"]["eraser"]) == (made[name]["run"], made[name]["choices"]["eraser"])
        assert run["identity"] == made[name]["identity"]
        assert {**run["config"], "tracker": None} == {**made[name]["config"], "tracker": None}
        assert [case[name] for case in summary["cases"]] == attacked(run)
        assert block[name]["rate"] == run["rates"]["attacked"]["rate"]
        assert run["floor"] == {}
        # Each stands on its own artefacts, whichever job had it made.
        assert run["uses"] == made[name]["uses"]
    difference = sum(attacked(summary)) - sum(attacked(by_hand["floor"]))
    assert block["excess"] == pytest.approx(100 * difference / 4)
    assert block["low"] <= block["excess"] <= block["high"]
    assert block["verdict"].startswith(("knows", "within", "below", "undecided, n of about"))
    assert "these two models" in block["how"]
    evaluations = summary["costs"]["attack"]["unet_evaluations"]
    assert block["unet_evaluations"]["attacked"] == evaluations


@pytest.mark.usefixtures("uce_in_store")
def test_another_eraser_takes_floor_and_ceiling_from_the_store(
    arguments: list[str], tmp_path: Path, spent: list[TextToImage]
) -> None:
    tiny_job.run([*arguments, "eraser=uce"], tmp_path / "uce")
    tiny_job.run([*arguments, *ESD, "floor=off"], tmp_path / "without")
    first = tiny_job.run([*arguments, *ESD], tmp_path / "esd")
    # The same job, and what it asks for besides is there.
    assert spent[-1].unet_evaluations == 0
    assert first["floor"]["runs"].keys() == {"floor", "ceiling"}
    # On the twin and the base themselves nothing is done twice.
    twin = tiny_job.run([*arguments, "eraser=retrained"], tmp_path / "twin")
    base = tiny_job.run([*arguments, "eraser=none"], tmp_path / "base")
    assert [model.unet_evaluations for model in spent[-2:]] == [0, 0]
    assert twin["floor"]["runs"]["floor"] == twin["run"]
    assert (twin["floor"]["excess"], base["floor"]["runs"]["ceiling"]) == (0, base["run"])


@pytest.mark.usefixtures("uce_in_store")
def test_the_floor_is_in_no_key(arguments: list[str], tmp_path: Path) -> None:
    runs = [tiny_job.run([*arguments, "eraser=uce", f"floor={floor}"], tmp_path / floor) for floor in ("off", "on")]
    assert runs[0]["run"] == runs[1]["run"]
    assert runs[0]["floor"] == {}
    assert {case["floor"] for case in runs[0]["cases"]} == {None}
    assert runs[1]["floor"]["runs"]
    # The run in the store is the one with the floor.
    path = tmp_path / "store" / "runs" / runs[1]["run"] / "summary.json"
    assert read_json(path)["floor"] == runs[1]["floor"]


def test_all_three_models_are_attacked_with_the_same_target_pictures(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[tuple[int, int, int]]] = []
    attack = stages.Stages.attack

    def recorded(self: stages.Stages, cases: list[PromptCase], erased: Any) -> Any:
        seen.append([(case.case_number, case.seed, int(case.target.long().sum())) for case in cases])
        return attack(self, cases, erased)

    monkeypatch.setattr(stages.Stages, "attack", recorded)
    tiny_job.run([*arguments, "eraser=uce"], tmp_path / "uce")
    assert len(seen) == 3
    assert seen[0] == seen[1] == seen[2]
    assert len({target for _, _, target in seen[0]}) > 1


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (["attack=none"], "nothing is attacked"),
        (["concept=van_gogh"], ""),
        (["model.knows=never_church"], "the model itself never knew something"),
        (["concept.name=horse"], "no model was trained without horse"),
        (["model.build=nowhere"], "neither shipped nor in nowhere"),
    ],
)
def test_auto_says_why_there_is_no_floor(
    command: list[str], reason: str, arguments: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    if command == ["attack=none"]:
        arguments = [part for part in arguments if not part.startswith("attack.")]
    job = tiny_job.make_job(*arguments, "eraser=uce", *command)
    with caplog.at_level(logging.INFO):
        assert floors.asks_for_floor(job) == (not reason)
    assert [line for line in caplog.messages if "floor" in line] == (
        [line for line in caplog.messages] if reason else []
    )
    assert reason in "".join(caplog.messages)


def test_a_twin_that_knew_none_of_the_three_serves_where_a_closer_one_was_not_trained(arguments: list[str]) -> None:
    of_van_gogh = [part for part in arguments if part != "concept=church"]
    jobs = [
        tiny_job.make_job(*of_van_gogh, "eraser=uce", concept) for concept in ("concept=church", "concept=van_gogh")
    ]
    assert [floors.never_knew(job).name for job in jobs] == ["never_church_0", "never_0"]


def test_a_floor_that_is_asked_for_and_not_to_be_had_is_refused_before_anything_is_made(arguments: list[str]) -> None:
    with pytest.raises(ValueError, match=r"floor is on, and there is none: .*retraining never_church_0"):
        tiny_job.make_job(*arguments, "eraser=uce", "floor=on", "model.knows=all", "model.build=nowhere")
    with pytest.raises(CommandError, match="floor is 'maybe'; it must be one of 'auto', 'on', 'off'"):
        tiny_job.make_job(*arguments, "eraser=uce", "floor=maybe")


def test_truth_values_of_yaml_are_switches(arguments: list[str]) -> None:
    for typed, meant in (("off", "off"), ("false", "off"), ("on", "on"), ("true", "on"), ("auto", "auto")):
        assert tiny_job.make_job(*arguments, "eraser=uce", f"floor={typed}").settings.floor == meant


@pytest.mark.usefixtures("uce_in_store")
def test_screen_tables_and_flat_numbers_show_the_floor(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = tiny_job.run([*arguments, "eraser=uce"], tmp_path / "uce")
    shown = capsys.readouterr().out
    block = summary["floor"]
    assert block["verdict"] in shown
    for words in ("floor: a model that never knew", "ceiling: attack on the unedited", "excess over the floor"):
        assert words in shown
    flat = flat_numbers(summary)
    assert flat["asr_floor"] == block["floor"]["rate"]
    assert (flat["excess"], flat["excess_low"]) == (block["excess"], block["low"])
    assert flat["verdict"] == block["verdict"]
    assert json.dumps(flat)
    listed = {**summary, "path": "p"}
    table = floor_table([listed])
    columns = ["concept", "method", "attack", "seed", "rate", "floor", "excess", "calibrated", "verdict"]
    assert list(table.columns) == columns
    assert table["verdict"].tolist() == [block["verdict"]]
    long = tables.long_table([listed])
    assert long["floor"].tolist() == [block["floor"]["rate"]]
    assert long["verdict"].tolist() == [block["verdict"]]


def test_two_processes_share_floor_and_ceiling_too(
    arguments: list[str], tmp_path: Path, spent: list[TextToImage]
) -> None:
    shared = run_shared([*arguments, "eraser=uce"], tmp_path / "two")
    alone = tiny_job.run([*arguments, "eraser=uce"], tmp_path / "one")
    assert shared["floor"] == alone["floor"]
    assert spent[-1].unet_evaluations == 0
    # The cases of both runs were shared.
    for run in shared["floor"]["runs"].values():
        attack = read_json(tmp_path / "store" / "runs" / run / "summary.json")["artefacts"]["attack"]
        lines = {path.name: len(path.read_text().splitlines()) for path in Path(attack).glob("outcomes*.jsonl")}
        assert lines == {"outcomes.jsonl": 2, "outcomes.1.jsonl": 2}


@pytest.mark.usefixtures("uce_in_store")
def test_a_damaged_run_is_put_together_again(arguments: list[str], tmp_path: Path, spent: list[TextToImage]) -> None:
    first = tiny_job.run([*arguments, "eraser=uce"], tmp_path / "first")
    path = tmp_path / "store" / "runs" / first["floor"]["runs"]["floor"] / "summary.json"
    path.write_text(path.read_text().replace('"attacked": true', '"attacked": false').replace('"erased": true', "0"))
    second = tiny_job.run([*arguments, "eraser=uce"], tmp_path / "second")
    assert second["floor"] == first["floor"]
    assert spent[-1].unet_evaluations == 0


def repeated(seed: int, training: int, attacked: list[bool], floor: list[bool], **others: Any) -> dict[str, Any]:
    cases = [
        {"case_number": number, "prompt": f"prompt {number}", "attacked": ours, "floor": never, "ceiling": True}
        for number, (ours, never) in enumerate(zip(attacked, floor, strict=True))
    ]
    rates = {name: Rate.of(values).as_dict() for name, values in (("attacked", attacked), ("floor", floor))}
    above = AboveFloor.of_pair(attacked, floor)
    config = {"model": {"training_seed": training}, "eraser": {"steps": 9}, "attack": {"seed": seed}, **others}
    return {
        "concept": "church",
        "choices": {"eraser": "esd", "pruning": "off", "attack": "gcg"},
        "seed": seed,
        "n": len(cases),
        "config": config,
        "cases": cases,
        "rates": rates,
        "floor": {"floor": rates["floor"], **above.as_dict(), "calibrated": None},
    }


def test_several_trainings_are_compared_training_by_training() -> None:
    never = [False] * 8
    outcomes = {
        (0, 0): [True] * 5 + [False] * 3,
        (0, 1): [True] * 7 + [False],
        (1, 0): [True] * 2 + [False] * 6,
    }
    runs = [repeated(seed, training, found, never) for (training, seed), found in outcomes.items()]
    first, second = np.mean([outcomes[0, 0], outcomes[0, 1]], axis=0), np.array(outcomes[1, 0], dtype=float)
    expected = AboveFloor.over_trainings([first, second], [never, never], units="trainings of base and twin")
    (row,) = trainings_table(runs).to_dict("records")
    assert row["over"] == "2 trainings of base and twin"
    assert (row["rate"], row["floor"]) == ("50 %", "0 %")
    assert row["excess"] == str(expected).replace(" points", "", 1)
    assert row["verdict"] == expected.verdict
    # Seeds of erasure of one base are a unit of their own, and another setting is another method.
    (row,) = trainings_table([*runs[:2], repeated(2, 0, [True] * 8, never, pruning={"sparsity": 1})]).to_dict("records")
    assert row["over"] == "2 seeds of erasure"
    assert trainings_table(runs[:1]).empty
    assert "over trainings" in "\n".join(floor_sections(runs))
    assert floor_sections([{**run, "floor": {}} for run in runs]) == []


@pytest.mark.parametrize("control", all_but({next(iter(floors.CONTROLS))}, floors.CONTROLS))
def test_a_control_stands_where_no_model_never_knew(
    tmp_path: Path, world: Path, control: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny model of these jobs is no canvas."""
    arguments = [*tiny_job.overrides(world, tmp_path / "store"), f"floor={control}", "pruning=off", "eraser.steps=2"]
    summary = tiny_job.run(arguments, tmp_path / "run")
    block = summary["floor"]
    assert (block["control"], block["knows"]) == (control, None)
    run = read_json(tmp_path / "store" / "runs" / block["runs"]["floor"] / "summary.json")
    assert run["choices"]["eraser"] == control
    assert [case["floor"] for case in summary["cases"]] == attacked(run)
    shown = capsys.readouterr().out
    assert f"control: {floors.CONTROLS[control][1]}" in shown
    assert "knows" not in block["verdict"]
    assert trainings_table([summary, {**summary, "seed": 1}]).empty


def test_relearning_is_told_as_savings(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    relearn = ["attack=relearn", "attack.checks=[1,2]", "attack.count=2", "attack.pictures_per_step=2"]
    plain = [part for part in arguments if not part.startswith("attack.") or "batch" in part]
    summary = tiny_job.run([*plain, *relearn, *ESD], tmp_path / "relearn")
    found = summary["floor"]["savings"]
    runs = {
        name: read_json(tmp_path / "store" / "runs" / run / "summary.json")
        for name, run in summary["floor"]["runs"].items()
    }

    def first_steps(run: dict[str, Any]) -> list[float]:
        names = {"step 1": 1, "step 2": 2}
        return [0 if case["erased"] else names[case["variant"]] if case["attacked"] else NEVER for case in run["cases"]]

    steps = {name: first_steps(run) for name, run in {**runs, "attacked": summary}.items()}
    expected = Savings.of(steps["attacked"], steps["floor"], steps["ceiling"], (1, 2))
    assert {name: found[name] for name in expected.as_dict()} == expected.as_dict()
    cosines = found["first_step_cosine"]
    assert all(value is None or -1 <= value <= 1 for value in cosines.values())
    assert "steps until half of the prompts show it" in capsys.readouterr().out
    assert flat_numbers(summary)["area"] == found["area"]
