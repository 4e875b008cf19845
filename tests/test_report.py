"""The report page: what it says is what the summary has, text is harmless, and nothing is fetched."""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from evaluation.statistics import Rate
from experiments.command import console
from experiments.command.errors import CommandError
from experiments.command.stored_runs import find_runs
from experiments.job.picture_list import FILE_NAME
from experiments.job.store import read_json
from experiments.results.floors import floor_table, short_standing, standing_texts
from experiments.results.report.comparison import compare_runs, holm
from experiments.results.report.drawing import attack_curve, tradeoffs
from experiments.results.report.facts import gather
from experiments.results.report.images import LARGEST, data_uri, difference
from experiments.results.report.layers import layers_of
from experiments.results.report.page import comparison_page, run_page, write_report
from experiments.results.report.verdict import HOLDS_BELOW, holds, verdict
from experiments.results.report.words import marked, shown
from tests.report_runs import HOSTILE, colour, make_run, make_sweep

ADDRESSES = ("src", "href", "action", "poster", "srcset", "data", "formaction", "background")


class Page(HTMLParser):
    """A page's tags, its visible text, and every address in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._within: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._within.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._within and self._within.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self._within):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def headings(self) -> list[str]:
        return re.findall(r"h[12]", " ".join(tag for tag, _ in self.tags))

    def with_class(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.tags if name in (attributes.get("class") or "").split()]

    @property
    def addresses(self) -> list[str]:
        return [value or "" for _, attributes in self.tags for key, value in attributes.items() if key in ADDRESSES]


def test_sections_come_in_their_order(tmp_path: Path) -> None:
    page = run_page(make_run(tmp_path, mask=True))
    places = [
        page.index(f"<h2>{title}")
        for title in ("Rates", "The attack", "Pictures", "What else", "What was lost", "Costs", "Where", "Provenance")
    ]
    assert places == sorted(places)
    assert page.index("<h1>") < places[0]
    assert page.index("<h1>") < page.index('<span class="badge undecided">') < places[0]


def test_numbers_are_those_of_the_summary_with_their_intervals(tmp_path: Path) -> None:
    summary = make_run(tmp_path, erased="1000", attacked="1100")
    page = Page(run_page(summary))
    rate = Rate.of([True, True, False, False])
    assert f"50 % [{100 * rate.low:.0f}, {100 * rate.high:.0f}] 2 of 4" in page.text
    assert "1,234" in page.text
    assert summary["run"] in page.text
    assert "0123456789abcdef" in page.text
    assert "torch 2.14.1" in page.text


def test_floor_and_ceiling_have_a_place(tmp_path: Path) -> None:
    summary = make_run(tmp_path)
    without = Page(run_page(summary)).text
    assert "no floor was measured" in without
    assert "no ceiling was measured" in without
    assert "No floor was measured:" in without
    summary = make_run(tmp_path, attacked="1" * 30 + "0" * 10, erased="0" * 40, floor="1" * 4 + "0" * 36)
    found = Page(run_page(summary)).text
    assert "o floor was measured" not in found
    assert "no ceiling was measured" not in found
    for text in (*standing_texts(summary).values(), "4 of 40 prompts under the same attack", "Verdict: knows."):
        assert text in found


@pytest.mark.parametrize(
    ("attacked", "floor", "expected", "words"),
    [
        ("1" * 20 + "0" * 20, "0" * 40, "does not hold", "knows"),
        # A high rate that a model which never knew reaches too is no sign of knowledge.
        ("1" * 30 + "0" * 50, "1" * 29 + "0" * 51, "holds", "within 10 points of the floor"),
        ("0" * 40, "1" * 20 + "0" * 20, "holds", "below the floor"),
        ("1" * 5 + "0" * 35, "1" * 2 + "0" * 38, "undecided", "undecided"),
        # Without room between floor and ceiling the attack says little of any model.
        ("1" * 12 + "0" * 20, "1" * 27 + "0" * 5, "undecided", "but no room to tell"),
    ],
)
def test_with_a_floor_the_verdict_above_it_decides(
    tmp_path: Path, attacked: str, floor: str, expected: str, words: str
) -> None:
    summary = make_run(tmp_path, erased="0" * len(attacked), attacked=attacked, floor=floor)
    assert holds(summary) == expected
    told = verdict(summary)
    assert told.holds == expected
    # The page, the screen and the tables say it in the same words.
    above = standing_texts(summary)["verdict"]
    assert words in above
    assert f"Verdict: {above}." in " ".join(told.sentences)
    assert floor_table([summary])["verdict"].tolist() == [above]
    assert "95 % interval" not in " ".join(told.sentences)


def test_runs_side_by_side_show_their_floors(tmp_path: Path) -> None:
    with_floor = make_run(tmp_path, attacked="1110", floor="0010")
    without = make_run(tmp_path, eraser="uce", attacked="1100")
    page = Page(comparison_page([with_floor, without]))
    assert short_standing(with_floor) in page.text
    assert "No floor was measured for some of these runs" in page.text
    assert "No floor was measured for some" not in Page(comparison_page([with_floor])).text


@pytest.mark.parametrize(
    ("attack", "erased", "attacked", "expected", "words"),
    [
        ("random", "0" * 40, "0" * 40, "holds", "failed on all 40 prompts"),
        ("random", "0" * 40, "1" * 30 + "0" * 10, "does not hold", "comes back under attack for 30 of 40"),
        ("random", "1" * 30 + "0" * 10, "1" * 30 + "0" * 10, "does not hold", "is not erased"),
        ("random", "0000", "1000", "undecided", "comes back under attack for 1 of 4"),
        ("none", "0" * 40, "0" * 40, "not attacked", "no attack was run"),
        ("none", "1" * 40, "1" * 40, "does not hold", "no attack was run"),
    ],
)
def test_the_verdict_follows_the_interval(
    tmp_path: Path, attack: str, erased: str, attacked: str, expected: str, words: str
) -> None:
    summary = make_run(tmp_path, attack=attack, erased=erased, attacked=attacked)
    assert holds(summary) == expected
    rate = Rate(**summary["rates"]["attacked"])
    if expected == "does not hold":
        assert rate.low >= HOLDS_BELOW
    if expected == "holds":
        assert rate.high < HOLDS_BELOW
    assert words in verdict(summary).headline
    assert verdict(summary).headline.startswith("Van Gogh")


def test_a_base_model_that_shows_little_is_told(tmp_path: Path) -> None:
    assert "with care" in " ".join(verdict(make_run(tmp_path, base="1000")).sentences)
    assert "with care" not in " ".join(verdict(make_run(tmp_path)).sentences)


def test_successes_come_first_in_the_gallery(tmp_path: Path) -> None:
    run_ = gather(make_run(tmp_path, erased="0010", attacked="0111"))
    assert [(case.number, case.ending) for case in run_.cases] == [
        (1, "brought back"),
        (3, "brought back"),
        (2, "not erased"),
        (0, "held"),
    ]
    assert run_.endings == [("brought back", 2), ("not erased", 1), ("held", 1)]
    assert run_.best_case is not None
    assert run_.best_case.number == 1
    assert all(set(case.pictures) == {"base", "erased", "attacked"} for case in run_.cases)


def test_text_of_prompts_is_harmless(tmp_path: Path) -> None:
    prompts = [HOSTILE, "plain"]
    summary = make_run(tmp_path, erased="00", attacked="10", prompts=prompts, adversarial=[f"=cmd {HOSTILE}", "plain"])
    summary["choices"]["attack"] = "<b>attack</b>"
    summary["costs"]["<i>stage</i>"] = summary["costs"]["edit"]
    text = run_page(summary)
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "alert(1)" not in "".join(re.findall(r"<script>(.*?)</script>", text, re.S))
    assert not [attributes for _, attributes in page.tags if {"onload", "onerror", "onclick"} & set(attributes)]
    assert "=cmd" in page.text
    assert "<script>alert(1)</script>" in page.text
    assert "<b>attack</b>" in page.text
    for character in ("\x00", "\x1b", "\u202e"):
        assert character not in text
    assert "\\x00\\x1b[31m \\u202e" in page.text
    text.encode("utf-8")


@pytest.mark.parametrize("several", [False, True])
def test_nothing_is_fetched(tmp_path: Path, several: bool) -> None:
    runs = make_sweep(tmp_path) if several else [make_run(tmp_path)]
    text = comparison_page(runs) if several else run_page(runs[0])
    page = Page(text)
    assert page.with_class("view")
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert not re.search(r"https?://|url\(|@import|//cdn", text)
    (policy,) = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "unsafe-inline'; script-src 'sha256-" in policy


def test_pictures_of_unsafe_concepts_are_blurred(tmp_path: Path) -> None:
    page = Page(run_page(make_run(tmp_path, concept="fire")))
    views = page.with_class("view")
    assert views
    assert len(page.with_class("blurred")) == len(views)
    assert "blurred until" in page.text
    assert not Page(run_page(make_run(tmp_path))).with_class("blurred")


def test_retained_pictures_come_worst_first(tmp_path: Path) -> None:
    kept = gather(make_run(tmp_path, retained=5)).retained
    assert kept is not None
    assert kept.judged
    lost = [len(each.lost or ()) for each in kept.shown]
    assert lost == sorted(lost, reverse=True)
    for one, other in zip(kept.shown, kept.shown[1:], strict=False):
        assert one.lost != other.lost or one.difference >= other.difference
    assert kept.heat is not None
    assert kept.heat.cell(None, None).n == 5
    assert kept.heat.cell("photo", "church").lost == sum(map(bool, lost))


def test_without_classifier_the_difference_decides(tmp_path: Path) -> None:
    summary = make_run(tmp_path, retained=4)
    summary["config"]["evaluator"] = {}
    kept = gather(summary).retained
    assert kept is not None
    assert not kept.judged
    assert kept.heat is None
    assert [each.prompt for each in kept.shown] == ["other 3", "other 2", "other 1", "other 0"]
    assert "There is no map" in run_page(summary)


def test_a_mask_is_shown_by_block(tmp_path: Path) -> None:
    summary = make_run(tmp_path, mask=True)
    layers = layers_of(Path(summary["artefacts"]["edit"]) / "edit.safetensors")
    assert layers is not None
    assert layers.pruned
    assert [(layer.name, layer.weights, layer.changed) for layer in layers.blocks] == [
        ("down_blocks.0.attentions", 32, 3),
        ("mid_block.attentions", 32, 29),
    ]
    assert "32 of 64 in the tensors with a mask" in Page(run_page(summary)).text
    assert "replaces 1 tensors with 32 weights" in Page(run_page(make_run(tmp_path, eraser="ac"))).text


def test_what_is_gone_from_the_store_is_told(tmp_path: Path) -> None:
    summary = make_run(tmp_path)
    shutil.rmtree(tmp_path / "pictures" / "attacked")
    assert "Some of this run's pictures are not in the store any more" in Page(run_page(summary)).text
    shutil.rmtree(tmp_path / "pictures")
    shutil.rmtree(tmp_path / "edits")
    assert "The edit is not in the store any more" in run_page(summary)
    (tmp_path / "runs" / summary["run"] / FILE_NAME).unlink()
    assert "kept no list of its pictures" in run_page(summary)


def test_a_moved_store_still_has_its_pictures(tmp_path: Path) -> None:
    summary = make_run(tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    moved = {**summary, "path": summary["path"].replace("/here/", "/there/")}
    found = gather(moved)
    assert not found.missing
    assert found.layers is not None


def test_damaged_pictures_are_one_sentence(tmp_path: Path) -> None:
    summary = make_run(tmp_path)
    next((tmp_path / "pictures" / "base").iterdir()).write_bytes(b"no picture")
    with pytest.raises(ValueError, match="is damaged"):
        run_page(summary)


def test_inserted_and_removed_words_are_marked() -> None:
    pieces = [tuple(piece) for piece in marked("two pumps, painted", "yday two pumps , drawn")]
    assert pieces == [
        ("yday", "inserted"),
        ("two pumps ,", "same"),
        ("painted", "removed"),
        ("drawn", "inserted"),
    ]
    assert marked("a b", "a b") == [("a b", "same")]
    assert marked("", "") == []
    assert [piece.kind for piece in marked("", "x")] == ["inserted"]


def test_no_character_plays_tricks() -> None:
    assert shown("plain\nçé漢🙂") == "plain\nçé漢🙂"
    assert shown("\x7f\x85\u200b\ud800\ufffe\r") == "\\x7f\\x85\\u200b\\ud800\\ufffe\\r"


def test_large_pictures_are_made_small_and_lose_their_text(tmp_path: Path) -> None:
    colour(tmp_path / "large.png", 50, size=2 * LARGEST)
    colour(tmp_path / "small.png", 50)
    assert (data_uri(tmp_path / "large.png") or "").startswith("data:image/webp;base64,")
    assert (data_uri(tmp_path / "small.png") or "").startswith("data:image/png;base64,")
    assert data_uri(tmp_path / "none.png") is None
    Image.new("RGB", (32, 32)).save(tmp_path / "black.png")
    Image.new("RGB", (32, 32), "white").save(tmp_path / "white.png")
    assert difference(tmp_path / "black.png", tmp_path / "white.png") == 1
    with pytest.raises(ValueError, match="sizes differ"):
        difference(tmp_path / "large.png", tmp_path / "small.png")


def test_the_curve_ends_at_the_rate(tmp_path: Path) -> None:
    summary = make_run(tmp_path, erased="0000", attacked="1110")
    curve = attack_curve(summary)
    assert curve is not None
    assert (curve.rate, curve.evaluations) == (0.75, 40)
    assert curve.end == (curve.frame.x(1), curve.frame.y(0.75))
    corners = curve.line.removeprefix("M").split(" L")
    assert [tuple(map(float, corner.split())) for corner in corners] == [
        (curve.frame.x(0), curve.frame.y(0)),
        (curve.frame.x(1), curve.frame.y(0)),
        (curve.frame.x(1), curve.frame.y(0.75)),
    ]
    assert attack_curve(make_run(tmp_path, attack="none")) is None


def test_several_runs_are_compared(tmp_path: Path) -> None:
    runs = make_sweep(tmp_path)
    found = compare_runs(runs)
    assert [row.number for row in found.rows] == list(range(1, 13))
    for concept in found.concepts:
        own = [row for row in found.rows if row.concept == concept and row.attacked]
        assert [row.method for row in own[:2]] == [own[0].method] * 2
        worst = [max(row.attacked.rate for row in half if row.attacked) for half in (own[:2], own[2:])]
        assert worst == sorted(worst)
    assert {(test.first.run.summary["choices"]["pruning"], test.what) for test in found.tests} == {("on", "pruning")}
    assert len(found.tests) == 6
    assert [plot.concept for plot in found.tradeoffs] == ["church", "fire", "Van Gogh"]
    page = Page(comparison_page(runs))
    assert "Of 12 runs," in page.text
    heads = re.findall(r"<tr><th class=\"number\">#.*?</tr>", comparison_page(runs), re.S)
    assert heads[0].count("<th") == 9
    assert len(page.with_class("run")) == 12


def test_runs_of_other_prompts_are_not_tested_against_each_other(tmp_path: Path) -> None:
    one, other = make_run(tmp_path, eraser="esd"), make_run(tmp_path, eraser="ac", attacked="0000")
    assert [test.what for test in compare_runs([one, other]).tests] == ["method"]
    other["identity"]["prompts"] = "others"
    assert not compare_runs([one, other]).tests


def test_holm_adjusts_for_all_tests() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_tradeoff_marks_what_no_run_beats(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path, kept=1.0, attacked="1111"),
        make_run(tmp_path, kept=0.8, attacked="1000"),
        make_run(tmp_path, kept=0.7, attacked="1100"),
    ]
    (plot,) = tradeoffs(runs)
    assert [point.best for point in plot.points] == [True, True, False]
    assert plot.points[0].x > plot.points[1].x > plot.points[2].x
    for summary in runs:
        del summary["measures"]["accuracy_style"]
    (plot,) = tradeoffs(runs)
    assert plot.label.startswith("FID")


def test_files_have_names_of_their_own(tmp_path: Path) -> None:
    one, other = make_run(tmp_path), make_run(tmp_path, eraser="ac")
    names = {write_report(runs, tmp_path / "pages").name for runs in ([one], [other], [one, other], [one, other, one])}
    assert len(names) == 4
    assert write_report([one, other], tmp_path).name == write_report([other, one], tmp_path).name


def test_runs_are_found_by_name_folder_and_file(tmp_path: Path) -> None:
    store = tmp_path / "store"
    one, other = make_run(store), make_run(store, eraser="ac")
    path = Path(one["path"])
    for given in (one["run"], str(path.parent), str(path)):
        assert [run_["run"] for run_ in find_runs([given], store)] == [one["run"]]
    assert {run_["run"] for run_ in find_runs([str(store / "runs")], store)} == {one["run"], other["run"]}
    assert len(find_runs([one["run"], str(path)], store)) == 1


def test_an_unknown_run_is_one_sentence_with_the_nearest(tmp_path: Path) -> None:
    one = make_run(tmp_path)
    misspelt = one["run"][:-1] + ("0" if one["run"][-1] != "0" else "1")
    with pytest.raises(
        CommandError, match=f"{misspelt} is no file, no folder and no run in .*did you mean {one['run']}"
    ):
        find_runs([misspelt], tmp_path)
    with pytest.raises(CommandError, match="has no runs"):
        find_runs(["x"], tmp_path / "empty")
    with pytest.raises(CommandError, match=r"has no summary\.json"):
        find_runs([str(tmp_path)], tmp_path)
    with pytest.raises(CommandError, match="is no summary of a run"):
        find_runs([str(tmp_path / "runs" / one["run"] / FILE_NAME)], tmp_path)


def test_a_damaged_summary_is_one_sentence(tmp_path: Path) -> None:
    path = Path(make_run(tmp_path)["path"])
    path.write_text(path.read_text().replace('"n": 4', '"n": 5'))
    with pytest.raises(CommandError, match="is damaged: its checksum does not fit"):
        find_runs([str(path)], tmp_path)


def test_a_real_job_has_a_page(
    undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every picture that a job made is on it, at its own prompt."""
    summary, store = undisturbed, undisturbed["store"]
    listed = read_json(store / "runs" / summary["run"] / FILE_NAME)
    assert [row["prompt"] for row in listed["cases"]] == [case["prompt"] for case in summary["cases"]]
    assert len(listed["retained"]) == 4
    for row in [*listed["cases"], *listed["retained"]]:
        for place in row["pictures"].values():
            assert (store / place).is_file()
    arguments = ["report", str(store.parent / "run"), "--store", str(store.parent), "--folder", str(tmp_path / "pages")]
    monkeypatch.setattr("sys.argv", ["eraselab", *arguments])
    console.main()
    page = Page(Path(capsys.readouterr().out.strip().splitlines()[-1]).read_text())
    assert "not in the store" not in page.text
    hero = 3
    assert len(page.with_class("view")) == hero + 3 * 5 + 2 * 4


def test_several_attacks_on_one_model_are_summed_up_by_the_strongest(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path, eraser="imported", attack=attack, erased="0000", attacked=attacked)
        for attack, attacked in (("random", "1000"), ("p4d", "1110"))
    ]
    page = comparison_page(runs)
    assert "the strongest attack brings back 3 of 4 with imported (p4d)." in page
    assert "by others (imported)" in run_page(runs[0])
