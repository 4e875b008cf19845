"""The leaderboard: records of our runs and of others, ranked by the strongest attack known."""

from pathlib import Path
from typing import Any

import pytest

from experiments.command import console
from experiments.job.store import read_json, write_json
from experiments.results.floors import short_standing
from experiments.results.report.leaderboard import boards_of, read_record, records_of, write_leaderboard
from tests.report_runs import make_run
from tests.test_report import Page


def contributed(path: Path, **fields: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"method": "theirs", "concept": "van_gogh", "base": "canvas", **fields})
    return path


def test_a_record_is_a_method_and_concept_with_every_attack(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path, attack="random", attacked="1000"),
        make_run(tmp_path, attack="unlearndiff", attacked="1110"),
        make_run(tmp_path, attack="unlearndiff", attacked="1111", seed=1),
        make_run(tmp_path, attack="none", attacked="1000"),
        make_run(tmp_path, attack="random", attacked="11", erased="00"),
        make_run(tmp_path, concept="church"),
    ]
    records = {(record.method, record.concept): record for record in records_of(runs)}
    assert set(records) == {("esd", "van_gogh"), ("esd", "church")}
    record = records["esd", "van_gogh"]
    assert {attack: found.rate for attack, found in record.ours.items()} == {"random": 0.25, "unlearndiff": 1.0}
    assert record.ours["unlearndiff"].seed == 1
    assert record.plain is not None
    assert record.plain.rate == 0.25
    assert record.ours["random"].n == 4
    assert "only 4 prompts" in record.doubts
    assert "floor not measured" in record.doubts


def test_a_floor_is_told_beside_the_success(tmp_path: Path) -> None:
    run = make_run(tmp_path, attack="unlearndiff", attacked="1110", floor="0010")
    (record,) = records_of([run])
    assert "floor not measured" not in record.doubts
    assert record.ours["unlearndiff"].verdict == run["floor"]["verdict"]
    page = Page(write_leaderboard([run], tmp_path / "records", tmp_path).read_text())
    assert f"{short_standing(run)}: {run['floor']['verdict']}" in page.text
    assert "floor not measured" not in page.text


def test_ranks_go_by_the_strongest_attack_known(tmp_path: Path) -> None:
    records = tmp_path / "records"
    contributed(records / "a.json", method="held", external={"p4d": {"rate": 0.1, "n": 50, "source": "someone"}})
    contributed(records / "b.json", method="claimed", reported={"p4d": {"rate": 0.0, "source": "their paper"}})
    runs = [make_run(tmp_path, attacked="1000"), make_run(tmp_path, eraser="ac", attacked="0000", erased="0000")]
    contributed(
        records / "c.json", method="ac", external={"gcg": {"rate": 0.9, "source": "others", "evidence": "found.csv"}}
    )
    page = Page(write_leaderboard(runs, records, tmp_path).read_text())
    (board,) = boards_of([read_record(path) for path in records.glob("*.json")])
    assert [(row.rank, row.record.method) for row in board.rows] == [
        (1, "held"),
        (2, "esd"),
        (3, "ac"),
        (None, "claimed"),
    ]
    assert "90 % gcg" in page.text
    assert "floor not measured" in page.text
    assert "found.csv" in page.text
    assert page.text.count("unknown: we ran nothing on it") == 2


def test_our_fields_are_written_anew_and_theirs_stay(tmp_path: Path) -> None:
    records = tmp_path / "records"
    path = contributed(
        records / "mine.json",
        method="esd",
        unreliable=["judged by hand"],
        footnote="a note",
        ours={"random": {"rate": 0.9}},
        reported={"random": {"rate": 0.1}},
    )
    write_leaderboard([make_run(tmp_path, attacked="1000")], records, tmp_path)
    assert list(records.iterdir()) == [path]
    found = read_json(path)
    assert found["ours"]["random"]["rate"] == 0.25
    assert (found["footnote"], found["unreliable"]) == ("a note", ["judged by hand"])
    assert found["reported"]["random"]["rate"] == 0.1
    first = path.read_text()
    write_leaderboard([make_run(tmp_path, attacked="1000")], records, tmp_path)
    assert path.read_text() == first


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"external": {"p4d": {"rate": 40}}}, "external.p4d.rate is 40"),
        ({"asr": 1}, "asr is 1"),
        ({"link": "javascript:alert(1)"}, "link is 'javascript:alert"),
        ({"method": ""}, "method is ''"),
    ],
)
def test_a_wrong_record_is_one_sentence(tmp_path: Path, fields: dict[str, Any], told: str) -> None:
    path = contributed(tmp_path / "wrong.json", **fields)
    with pytest.raises(ValueError, match="is no record of the leaderboard") as error:
        read_record(path)
    assert told in str(error.value)
    path.write_text("{")
    with pytest.raises(ValueError, match="is no JSON file"):
        read_record(path)


def test_two_records_of_the_same_are_refused(tmp_path: Path) -> None:
    contributed(tmp_path / "a.json")
    contributed(tmp_path / "b.json")
    with pytest.raises(ValueError, match="are records of the same: theirs, van_gogh, canvas"):
        write_leaderboard([], tmp_path, tmp_path)


def test_text_of_records_is_harmless(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>"
    contributed(
        tmp_path / "a.json", method=hostile, footnote=hostile, authors=hostile, external={hostile: {"rate": 0.5}}
    )
    page = Page(write_leaderboard([], tmp_path, tmp_path).read_text())
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert page.text.count(hostile) >= 3


def test_the_command_writes_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "store")
    monkeypatch.setattr(
        "sys.argv", ["eraselab", "leaderboard", "--store", str(tmp_path / "store"), "--folder", str(tmp_path / "pages")]
    )
    console.main()
    assert capsys.readouterr().out.strip().endswith("leaderboard.html")
    assert len(list((tmp_path / "pages" / "leaderboard").glob("*.json"))) == 1
    monkeypatch.setattr("sys.argv", ["eraselab", "leaderboard", "--store", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="there is no such folder"):
        console.main()
