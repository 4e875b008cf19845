"""Calibration: errors of a judge on pictures whose truth is known."""

import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from evaluation.calibration import calibrate
from evaluation.verdicts import Verdicts
from experiments.command import console
from experiments.instruments.labelled_pictures import batched, draw_pictures, list_pictures, read_pictures
from experiments.job.store import read_json
from tests.oracles.statistics import wilson
from tests.tiny_job import make_job

SCORES = [0.9, 0.8, 0.7, 0.35, 0.3, 0.3, 0.2, 0.1]
TRUTH = [True, True, False, True, False, True, False, False]


def by_brightness(images: torch.Tensor) -> Verdicts:
    """The concept is light: the score is the first pixel, and more than a half is present."""
    scores = images[:, 0, 0, 0].float() / 100
    return Verdicts(scores > 0.5, scores)


def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for start in range(0, len(SCORES), 3):
        levels = torch.tensor(SCORES[start : start + 3]).mul(100).round().to(torch.uint8)
        yield levels[:, None, None, None].expand(-1, 3, 4, 4), torch.tensor(TRUTH[start : start + 3])


def counts(rate: object) -> tuple[int, int]:
    fields = asdict(rate)  # type: ignore[call-overload]
    assert (fields["low"], fields["high"]) == pytest.approx(wilson(fields["successes"], fields["n"]))
    return fields["successes"], fields["n"]


def test_errors_are_counted_with_their_intervals():
    found = calibrate(by_brightness, batches())
    assert (found.n, found.present) == (8, 4)
    assert counts(found.verdicts.error) == (3, 8)
    assert counts(found.verdicts.false_positives) == (1, 4)
    assert counts(found.verdicts.false_negatives) == (2, 4)
    assert counts(found.verdicts.precision) == (2, 3)
    assert counts(found.verdicts.recall) == (2, 4)


def test_other_thresholds_are_tried():
    thresholds = calibrate(by_brightness, batches()).thresholds
    assert counts(thresholds[0.75].false_positives) == (0, 4)
    assert counts(thresholds[0.75].recall) == (2, 4)
    assert counts(thresholds[0.15].recall) == (4, 4)
    assert counts(thresholds[0.15].false_positives) == (3, 4)
    assert thresholds[0.95].precision is None


def test_the_area_under_the_roc_curve_is_the_share_of_pairs_in_order():
    pairs = [
        1.0 if one > other else 0.5 if one == other else 0.0
        for one, there in zip(SCORES, TRUTH, strict=True)
        for other, here in zip(SCORES, TRUTH, strict=True)
        if there and not here
    ]
    assert calibrate(by_brightness, batches()).auroc == pytest.approx(sum(pairs) / len(pairs))


def test_pictures_of_one_kind_have_the_errors_that_they_can_have():
    found = calibrate(by_brightness, [(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([True, True]))])
    assert found.auroc is None
    assert found.verdicts.false_positives is None
    assert counts(found.verdicts.false_negatives) == (2, 2)
    with pytest.raises(ValueError, match="no pictures to judge"):
        calibrate(by_brightness, [])


def write(path: Path, level: int, size: tuple[int, int] = (6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, level, level)).save(path)
    return path


def test_a_labelled_folder_is_read_one_picture_at_a_time(tmp_path: Path):
    write(tmp_path / "present" / "b.jpg", 90)
    write(tmp_path / "present" / "more" / "a.PNG", 80)
    write(tmp_path / "absent" / "c.png", 10, size=(5, 5))
    (tmp_path / "absent" / "notes.txt").write_text("no picture")
    listed = list_pictures(tmp_path)
    assert [(file.name, present) for file, present in listed] == [("b.jpg", True), ("a.PNG", True), ("c.png", False)]
    pictures = read_pictures(listed)
    image, present = next(pictures)
    assert (image.shape, image.dtype, present) == ((3, 4, 6), torch.uint8, True)
    listed[1][0].unlink()
    with pytest.raises(ValueError, match=r"a.PNG is no picture that can be read"):
        next(pictures)


def test_a_labelled_table_is_read(tmp_path: Path):
    write(tmp_path / "pictures" / "a.png", 90)
    elsewhere = write(tmp_path / "b.png", 90)
    table = tmp_path / "pictures" / "truth.csv"
    table.write_text(f"present,remark,file\n1,,a.png\nNo,x,{elsewhere}\n")
    assert list_pictures(table) == [(tmp_path / "pictures" / "a.png", True), (elsewhere, False)]
    table.write_text("file,present\na.png,maybe\n")
    with pytest.raises(ValueError, match="line 2: present is 'maybe'; it must be 1 or 0"):
        list_pictures(table)
    table.write_text("file,present\nz.png,1\n")
    with pytest.raises(FileNotFoundError, match=r"line 2: there is no file .*z.png"):
        list_pictures(table)
    table.write_text("file,truth\na.png,1\n")
    with pytest.raises(ValueError, match="lacks the columns present"):
        list_pictures(table)


def test_pictures_that_are_not_there_are_one_sentence(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="name a folder with the subfolders present and absent, or a CSV"):
        list_pictures(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="names no pictures; they lie in its subfolders present and absent"):
        list_pictures(tmp_path)


def test_batches_hold_neighbours_of_one_shape():
    sizes = [4, 4, 4, 5, 4]
    labelled = (
        (torch.full((3, size, size), index, dtype=torch.uint8), index % 2 == 0) for index, size in enumerate(sizes)
    )
    found = [(images.shape[0], images.shape[2], truth.tolist()) for images, truth in batched(labelled, 2)]
    assert found == [(2, 4, [True, False]), (1, 4, [True]), (1, 5, [False]), (1, 4, [True])]


@pytest.mark.parametrize("concept", ["van_gogh", "church", "fire"])
def test_the_canvas_draws_pictures_whose_truth_its_judge_sees(concept: str):
    job = make_job(f"concept={concept}")
    drawn = list(islice(draw_pictures(job.concept, seed=7), 24))
    assert [present for _, present in drawn] == [True, False] * 12
    found = calibrate(job.judge, batched(drawn, 10))
    assert counts(found.verdicts.error)[0] <= 1
    again = list(islice(draw_pictures(job.concept, seed=7), 3))
    assert all(one.equal(other) for (one, _), (other, _) in zip(drawn, again, strict=False))


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["eraselab", "calibrate", *map(str, arguments)])
    console.main()


def test_the_command_writes_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run_command(monkeypatch, "--drawn", 12, "--folder", tmp_path, "concept=church")
    result = read_json(tmp_path / "judge_canvas_church.json")
    assert (result["n"], result["present"], result["judge"]) == (12, 6, "canvas")
    assert result["config"]["label"] == "church"
    assert result["thresholds"]["0.50"]["error"]["n"] == 12
    text = (tmp_path / "judge_canvas_church.md").read_text()
    assert text in capsys.readouterr().out
    assert "12 pictures (drawn on the canvas, seed 1000), of which 6 show the concept" in text
    assert f"{100 * result['verdicts']['error']['rate']:.1f} % [" in text


def test_the_command_judges_labelled_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "present" / "a.png", 200, size=(40, 30))
    write(tmp_path / "absent" / "b.png", 100, size=(30, 40))
    run_command(monkeypatch, "judge=nudenet_exposed", "--pictures", tmp_path, "--folder", tmp_path / "results")
    result = read_json(tmp_path / "results" / "judge_nudenet_exposed_van_gogh.json")
    assert (result["n"], result["verdicts"]["false_negatives"]["successes"]) == (2, 1)
    assert result["verdicts"]["false_positives"]["successes"] == 0
    assert result["config"]["threshold"] == 0.6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["concept=van_gogh_church"], "which the canvas does not draw; give labelled pictures"),
        (["judge=nudnet"], "did you mean nudenet"),
        (["judge.label=monet"], "label is 'monet'"),
        (["--pictures", "nowhere"], "nowhere, which is not there"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(SystemExit, match=message):
        run_command(monkeypatch, *arguments)
