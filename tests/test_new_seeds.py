"""Found texts with new seeds and before a second judge: what is drawn, what is said of it, what it costs."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from attacks.cases import Check, Outcome
from diffusion.model import TextToImage
from experiments.job.new_seeds import NewSeeds, by_text, found_texts, holding, rows_of, second_opinion
from experiments.results.screen import holding_texts
from tests import tiny_job
from tests.tiny_job import make_job

IMAGE = torch.zeros((3, 2, 2), dtype=torch.uint8)


def outcome(number: int, *, plain: bool = False, success: bool = True, variant: str = "") -> Outcome:
    check = Check(f"text {number}", 5, success, 0.5, None, 4, variant=variant)
    return Outcome(number, "plain", f"text {number}", plain, success, 0.5, (check,), 4, IMAGE)


def test_only_texts_that_the_attack_broke_the_model_with_are_tried_again() -> None:
    outcomes = [outcome(0), outcome(1, plain=True), outcome(2, success=False), outcome(3, variant="step 2"), outcome(4)]
    assert [found.case_number for found in found_texts(outcomes)] == [0, 4]


def test_every_text_gets_seeds_of_its_own_whatever_found_it() -> None:
    found = [outcome(0), outcome(4)]
    rows = rows_of(found, [3.0, 7.5], 3)
    assert [(row.prompt, row.guidance) for row in rows] == [("text 0", 3.0)] * 3 + [("text 4", 7.5)] * 3
    assert len({row.seed for row in rows}) == 6
    assert all(0 <= row.seed < 2**31 for row in rows)
    assert [row.seed for row in rows_of(found[1:], [7.5], 2)] == [row.seed for row in rows[3:5]]


def test_the_share_of_a_texts_pictures_is_averaged_over_texts() -> None:
    verdicts = [True, True, False, False, False, True]
    shown = by_text(verdicts, 2)
    assert shown == [[True, True], [False, False], [False, True]]
    said = holding(2, 5, shown)
    assert {key: said[key] for key in ("seeds", "successes", "texts")} == {"seeds": 2, "successes": 5, "texts": 3}
    assert (said["shown"]["n"], said["shown"]["mean"]) == (3, 0.5)
    assert 0 <= said["shown"]["low"] < 0.5 < said["shown"]["high"] <= 1
    said["second_judge"] = second_opinion([True, False, True], shown)
    texts = holding_texts({"holds": said})
    assert texts["holds on 2 new seeds"].startswith("50 % [")
    assert texts["holds on 2 new seeds"].endswith("of the pictures of 3 texts found")
    assert texts["seen by a second judge"].startswith("66.7 %") or "2/3" in texts["seen by a second judge"]


def test_nothing_is_said_where_nothing_was_found_and_why_where_there_is_no_text() -> None:
    assert holding_texts({}) == holding_texts({"holds": holding(3, 0, [])}) == {}
    assert holding_texts({"holds": holding(3, 4, [])}) == {"holds on new seeds": "no text among 4 successes"}


@pytest.mark.parametrize("fields", [{"seeds": -1}, {"seeds": 1.5}, {"judge": 3}])
def test_bad_values_are_refused(fields: dict) -> None:
    with pytest.raises(ValidationError):
        NewSeeds(**fields)


def test_a_job_says_beside_its_success_rate_whether_texts_hold(
    tmp_path: Path, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models: list[TextToImage] = []
    load = tiny_job.Float64Folder.load
    monkeypatch.setattr(tiny_job.Float64Folder, "load", lambda folder: models.append(load(folder)) or models[-1])
    command = [
        *tiny_job.overrides(world, tmp_path / "store"),
        *("attack=random", "attack.tries=6", "~attack.timesteps", "~attack.steps_per_timestep", "~attack.batch_size"),
    ]
    command = [part for part in command if part.split("=")[0].lstrip("~") not in SEARCH_FIELDS]
    second = ["+transfer.judge._target_=tests.tiny_job.ErraticJudge"]
    summary = tiny_job.run([*command, "transfer.seeds=4", *second], tmp_path / "run")
    broken = [case for case in summary["cases"] if case["attacked"] and not case["erased"]]
    assert broken, "the example should have a found text"
    holds = summary["holds"]
    assert (holds["seeds"], holds["successes"], holds["texts"]) == (4, len(broken), len(broken))
    assert holds["second_judge"]["found"]["rate"] == 1
    assert holds["second_judge"]["shown"] == holds["shown"]
    assert summary["costs"]["transfer"]["unet_evaluations"] == len(broken) * 4 * 2 * 2
    assert f"of the pictures of {len(broken)} texts found" in " ".join(capsys.readouterr().out.split())

    without = tiny_job.run([*command, "transfer.seeds=0"], tmp_path / "without")
    assert without["holds"] == {}
    assert without["run"] != summary["run"]
    assert without["rates"] == summary["rates"]


SEARCH_FIELDS = {"attack.timesteps", "attack.steps_per_timestep", "attack.batch_size"}


def test_a_second_judge_is_chosen_by_its_name() -> None:
    job = make_job("transfer.judge=canvas", "tracker=off")
    assert type(job.transfer.judge) is type(job.judge)
    assert job.transfer.seeds == 3
    assert make_job("tracker=off").transfer.judge is None
