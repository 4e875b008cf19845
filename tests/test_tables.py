"""Tables: the right runs, every number with its interval, every row traceable."""

import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_class

from diffusion.source_code import code_of
from evaluation.floors import AboveFloor
from evaluation.statistics import Mean, PairedComparison, Rate
from experiments.command import collect, console
from experiments.command.composing import job_overrides
from experiments.job.store import SCHEMA_VERSION, checked, write_json
from experiments.job.summary import read_summaries
from experiments.results import figures, tables
from experiments.results.screen import measure_text, mixtures, noise_numbers, noise_texts, short_text


@pytest.fixture(scope="module")
def table1() -> list[dict[str, Any]]:
    GlobalHydra.instance().clear()
    return collect.experiment_jobs("table1")


def summary(
    job: dict[str, Any], choices: dict[str, str], *, run: str, attacked: list[bool], path: str = "p"
) -> dict[str, Any]:
    cases = [{"erased": False, "attacked": success} for success in attacked]
    rates = {"base": [True] * len(cases), "erased": [False] * len(cases), "attacked": attacked}
    return {
        "run": run,
        "path": path,
        "concept": job["concept"]["name"],
        "choices": choices,
        "threat_model": "white_box",
        "n": len(cases),
        "seed": job["seed"],
        "rates": {name: Rate.of(values).as_dict() for name, values in rates.items()},
        "measures": {"clip_score": Mean.of([20.0, 30.0]).as_dict(), "clip_score_base": 31.0, "fid": 1.25, "fid_n": 80},
        "costs": {
            "attack": {"unet_evaluations": 10, "seconds": 1.5, "peak_memory_bytes": 1},
            "edit": {"unet_evaluations": 2000, "seconds": 12.34, "peak_memory_bytes": 2**30},
        },
        "edit": {"size_bytes": 2**19, "hash": choices["eraser"] + choices["pruning"], "metadata": {}},
        "cases": cases,
        "identity": {"attack": job["attack"], "pruning": job["pruning"], "eraser": job["eraser"], "edit": run},
        "config": job,
    }


def test_table1_is_27_jobs_without_an_impossible_pair(table1: list[dict[str, Any]]) -> None:
    cells = {
        (job["concept"]["name"], job["eraser"]["_target_"], job["pruning"]["_target_"], job["attack"]["_target_"])
        for job in table1
    }
    assert len(table1) == len(cells) == 27
    assert {(eraser.rpartition(".")[2], pruning.rpartition(".")[2]) for _, eraser, pruning, _ in cells} == {
        ("NoEraser", "Off"),
        ("ESD", "Off"),
        ("ESD", "Learned"),
    }
    assert {job["prompts"] for job in table1} == {64}


def test_a_run_whose_base_model_lacks_the_concept_is_marked_and_named(
    table1: list[dict[str, Any]], tmp_path: Path
) -> None:
    choices = {"eraser": "esd", "pruning": "off", "attack": "none"}
    sound, doubtful = (summary(table1[0], choices, run=name, attacked=[True, False, False]) for name in "ab")
    doubtful["rates"]["base"] = Rate.of([True, False, False]).as_dict()
    doubtful["edit"]["hash"] = "another"
    assert list(tables.reading_table([sound, doubtful])["base model"].str.contains("(!)", regex=False)) == [False, True]
    assert list(tables.model_table([sound, doubtful])["shown"].str.contains("(!)", regex=False)) == [False, True]
    markdown, table, _ = tables.write_tables([sound, doubtful], "mine", tmp_path)
    concept = sound["concept"]
    sentence = f"The base model shows {concept} in 1 of 3 pictures, less than half; this run supports no claim"
    assert f"- (!) b: {sentence}" in markdown.read_text()
    warned = pd.read_csv(table, keep_default_na=False)["warnings"]
    assert warned[0] == ""
    assert warned[1].startswith(sentence)


def test_demo_is_esd_without_and_with_pruning() -> None:
    jobs = collect.experiment_jobs("demo")
    assert [job["pruning"]["_target_"].rpartition(".")[2] for job in jobs] == ["Off", "Learned"]
    assert all(job["concept"]["name"] == "van_gogh" for job in jobs)


def test_a_cell_is_the_newest_run_of_its_config_whatever_the_store_and_batch_size(
    table1: list[dict[str, Any]],
) -> None:
    job = table1[0]
    moved = {**job, "store": "elsewhere", "tracker": {}, "sampling": {**job["sampling"], "batch_size": 1}}
    newest, older = (collect.StoredRun.of({"run": run, "config": moved}) for run in ("new", "old"))
    assert collect.find_run(job, [newest, older]) is newest.summary
    assert collect.find_run(table1[1], [newest, older]) is None
    assert collect.find_run({**job, "seed": 1}, [newest]) is None


def test_a_run_of_before_a_field_was_there_did_what_the_field_says_by_default(table1: list[dict[str, Any]]) -> None:
    job = next(job for job in table1 if "restarts" in job["attack"])
    without = {key: value for key, value in job["attack"].items() if key != "restarts"}
    older = collect.StoredRun.of({"run": "old", "config": {**job, "attack": without}})
    assert job["attack"]["restarts"] == 0
    assert collect.find_run(job, [older]) is older.summary
    assert collect.find_run({**job, "attack": {**job["attack"], "restarts": 1}}, [older]) is None
    # What the class would not take by itself says what was done.
    other = collect.StoredRun.of({"config": {**job, "attack": {**without, "tokens": 7}}})
    assert collect.find_run(job, [other]) is None


def test_files_hold_intervals_and_the_way_back_to_each_run(table1: list[dict[str, Any]], tmp_path: Path) -> None:
    esd = {"eraser": "esd", "pruning": "off", "attack": "unlearndiff"}
    van_gogh = next(job for job in table1 if job["concept"]["name"] == "van_gogh")
    runs = [
        summary(van_gogh, esd, run="aaaa", attacked=[True, True, True, False], path="artifacts/runs/aaaa/summary.json"),
        summary(van_gogh, esd | {"pruning": "on"}, run="bbbb", attacked=[True, False, False, False]),
    ]
    markdown, csv, latex = tables.write_tables(runs, "table1", tmp_path, missing=["church, ESD"])
    text = markdown.read_text()
    assert str(Rate.of([True, True, True, False])) in text
    assert "aaaa" in text
    # Nothing is a table for reading that is wider than this; paths stay in the CSV.
    assert "artifacts/runs" not in text
    assert max(line.count("|") - 1 for line in text.splitlines() if line.startswith("|")) <= 9
    assert str(PairedComparison.of([True, False, False, False], [True, True, True, False])) in text
    assert "1 runs are missing: church, ESD." in text
    frame = pd.read_csv(csv)
    assert list(frame["attacked"]) == [0.75, 0.25]
    assert frame["attacked_low"][0] == pytest.approx(Rate.of([True] * 3 + [False]).low)
    assert list(frame["run"]) == ["aaaa", "bbbb"]
    assert frame["clip_score"][0] == 25.0
    assert frame["path"][0] == "artifacts/runs/aaaa/summary.json"
    assert r"van\_gogh" in latex.read_text()
    assert r"75.0 \%" in latex.read_text()


def test_runs_with_several_seeds_have_their_mean_and_spread(table1: list[dict[str, Any]], tmp_path: Path) -> None:
    esd = {"eraser": "esd", "pruning": "off", "attack": "unlearndiff"}
    runs = [
        summary({**table1[0], "seed": seed}, esd, run=str(seed), attacked=[True] * hits + [False] * (4 - hits))
        for seed, hits in enumerate((1, 2, 4))
    ]
    other = summary(table1[0], esd | {"pruning": "on"}, run="other", attacked=[True] * 4)
    table = tables.seeds_table([*runs, other])
    assert len(table) == 1  # one seed has no spread
    assert table["seeds"][0] == "0, 1, 2"
    assert table["under attack"][0] == "58.3 % ± 38.19 (25 - 100)"
    assert table["fid"][0] == "1.25 ± 0.00 (1.25 - 1.25)"
    assert table["clip score"][0] == "25.00 ± 0.00 (25 - 25)"
    text = tables.write_tables([*runs, other], "seeds", tmp_path)[0].read_text()
    assert "58.3 % ± 38.19 (25 - 100)" in text


def test_an_erased_model_is_a_row_whatever_attacked_it(table1: list[dict[str, Any]], tmp_path: Path) -> None:
    esd, pruned = ({"eraser": "esd", "pruning": pruning} for pruning in ("off", "on"))
    runs = [
        summary(table1[0], esd | {"attack": "none"}, run="a", attacked=[False] * 4),
        summary(table1[0], esd | {"attack": "random"}, run="b", attacked=[True] * 3 + [False]),
        summary(table1[0], pruned | {"attack": "random"}, run="c", attacked=[False] * 4),
    ]
    runs[2]["edit"]["metadata"] = {"maskable_weights": 8, "pruned_weights": 1}
    table = tables.model_table(runs)
    assert list(table.columns[:6]) == ["concept", "eraser", "pruning", "seed", "shown", "random"]
    assert [cell.partition(" [")[0] for cell in table["random"]] == ["75 %", "0 %"]
    assert list(table["pruned"]) == ["", "12.5 %"]
    assert list(table["clip score"]) == ["25.00"] * 2
    assert list(table.iloc[0, -4:]) == ["2,000", "12.3", "1.00 GiB", "0.50 MiB"]
    assert tables.model_table(runs[:2]).empty
    assert "## Erased models" in tables.write_tables(runs, "models", tmp_path)[0].read_text()


def test_settings_are_named_where_runs_of_one_method_differ(table1: list[dict[str, Any]]) -> None:
    def run(eraser: str, **settings: Any) -> dict[str, Any]:
        job = {**table1[0], "eraser": {**table1[0]["eraser"], "scope": "xattn", **settings}}
        return summary(job, {"eraser": eraser, "pruning": "off", "attack": "none"}, run="r", attacked=[True])

    runs = [run("esd", steps=100, templates=["a"]), run("esd", steps=200, templates=["a"]), run("ac", steps=5)]
    assert tables.varied_settings(runs) == ["steps=100", "steps=200", ""]


def test_a_field_that_older_runs_lack_is_no_difference(table1: list[dict[str, Any]]) -> None:
    def run(**settings: Any) -> dict[str, Any]:
        job = {**table1[0], "eraser": {"_target_": "e", **settings}, "pruning": {"_target_": "p"}}
        choices = {"eraser": "esd", "pruning": "off", "attack": "none"}
        return summary(job, choices, run="r", attacked=[True])

    assert tables.varied_settings([run(steps=1), run(steps=1, new=2), run(steps=1, new=2)]) == ["", "", ""]
    assert tables.varied_settings([run(steps=1), run(steps=None)]) == ["steps=1", "steps=None"]


def attacked_by(
    job: dict[str, Any], attack: str, attacked: list[bool], *, variant: str = "", pruning: str = "off"
) -> dict[str, Any]:
    choices = {"eraser": "esd", "pruning": pruning, "attack": attack}
    made = summary(job, choices, run=attack + pruning, attacked=attacked)
    for case in made["cases"]:
        case["variant"] = variant if case["attacked"] else ""
    curve = [{"attempts": 0, "unet_evaluations": 8, "rate": 0.0}]
    curve += [{"attempts": 1, "unet_evaluations": 80, "rate": sum(attacked) / len(attacked)}]
    return made | {"curve": curve}


@pytest.fixture
def attacks(table1: list[dict[str, Any]]) -> list[dict[str, Any]]:
    van_gogh = next(job for job in table1 if job["concept"]["name"] == "van_gogh")
    church = next(job for job in table1 if job["concept"]["name"] == "church")
    return [
        attacked_by(van_gogh, "random", [True, False, False, False]),
        attacked_by(van_gogh, "unlearndiff", [False, True, False, False]),
        attacked_by(van_gogh, "embedding", [False, False, True, False], variant="embeddings after 10 steps"),
        attacked_by(church, "random", [True, True, True, False]),
    ]


def test_attacks_are_rows_and_erased_models_columns(attacks: list[dict[str, Any]]) -> None:
    table = tables.attack_table(attacks).set_index("attack")
    assert list(table.columns) == ["access", "van_gogh, esd, pruning off, seed 0", "church, esd, pruning off, seed 0"]
    van_gogh, church = table.columns[1:]
    assert list(table.index) == ["random", "unlearndiff", "embedding", "union of texts", "union of all"]
    low, high = (round(100 * end) for end in (Rate.of([True] + [False] * 3).low, Rate.of([True] + [False] * 3).high))
    # 10 evaluations of 4 prompts
    assert table[van_gogh]["random"] == f"25 % [{low}, {high}], 2"
    assert table[church]["embedding"] == ""


def test_a_union_counts_a_prompt_once_and_knows_texts_from_what_is_none(attacks: list[dict[str, Any]]) -> None:
    table = tables.attack_table(attacks).set_index("attack")
    van_gogh, church = table.columns[1:]
    assert table[van_gogh]["union of texts"].startswith("50 %")
    assert table[van_gogh]["union of all"].startswith("75 %")
    assert table[church]["union of texts"] == table[church]["union of all"]
    assert table[church]["union of all"].startswith("75 %")


def test_attacks_that_tell_nothing_are_named_and_count_in_no_union(
    attacks: list[dict[str, Any]], tmp_path: Path
) -> None:
    def with_floor(run: dict[str, Any], never: str, ceiling: str) -> dict[str, Any]:
        marks = [[mark == "1" for mark in text] for text in (never, ceiling)]
        cases = [
            case | {"attacked": case["attacked"], "floor": f, "ceiling": c, "case_number": n, "prompt": str(n)}
            for n, (case, f, c) in enumerate(zip(run["cases"] * 10, *marks, strict=True))
        ]
        shown = [case["attacked"] for case in cases]
        block = AboveFloor.of_pair(shown, marks[0]).as_dict() | {"control": None, "knows": "never", "runs": {}}
        block |= {name: Rate.of(own).as_dict() for name, own in zip(("floor", "ceiling"), marks, strict=True)}
        return run | {"cases": cases, "n": 40, "floor": block | {"calibrated": None}}

    probe, blind = ("0" * 36 + "1" * 4, "1" * 40), ("1" * 40, "1" * 40)
    runs = [with_floor(attacks[0], *probe), with_floor(attacks[1], *blind), with_floor(attacks[2], *probe)]
    table = tables.attack_table(runs).set_index("attack")
    (model,) = table.columns[1:]
    assert table[model]["union of texts"].startswith("25 %")
    assert table[model]["union of texts"].endswith("floor 10 %")
    assert table[model]["union of all"].startswith("50 %")
    text = tables.write_tables(runs, "unions", tmp_path)[0].read_text()
    assert "Left out of the unions: unlearndiff on van_gogh (floor 100 %, ceiling 100 %)." in text
    assert "Left out of the unions: random" not in text


def test_what_was_measured_of_the_noise_is_told(attacks: list[dict[str, Any]]) -> None:
    run = attacks[0]
    assert noise_texts(run) == noise_numbers(run) == {}
    measured = [{"energy": -3.0, "residual": 1e-6}, {"energy": 1.0, "residual": 2e-5}, {}, {}]
    cases = [
        case | {"measured": own, "counts": own.get("energy") != -3}
        for case, own in zip(run["cases"], measured, strict=True)
    ]
    found = noise_numbers({**run, "cases": cases})
    assert found == {
        "noise_of": 2,
        "noise_distance": 2.0,
        "noise_distance_most": 3.0,
        "noise_outside": 1,
        "inversion_residual": 2e-5,
    }
    assert noise_texts({**run, "cases": cases}) == {
        "distance of the noise from Gaussian noise": "2.0 sd of its energy, 3.0 at most",
        "not counted, as the noise is none": "1 of 2",
        "largest residual of the inversion": "2e-05",
    }
    assert tables.long_table([{**run, "cases": cases}])["noise_outside"].tolist() == [1]


def test_one_attack_needs_no_table_of_attacks(attacks: list[dict[str, Any]], tmp_path: Path) -> None:
    assert tables.attack_table(attacks[2:]).empty
    assert "## Attacks" not in tables.write_tables(attacks[2:], "one", tmp_path)[0].read_text()
    assert "## Attacks" in tables.write_tables(attacks, "several", tmp_path)[0].read_text()


def test_cost_curves_have_a_panel_per_model_and_a_line_per_attack(attacks: list[dict[str, Any]]) -> None:
    pruned = attacked_by(attacks[0]["config"], "random", [False] * 4, pruning="on")
    plain = attacked_by(attacks[0]["config"], "none", [False] * 4)
    figure = figures.cost_curves([*attacks, pruned, plain])
    panels = {panel.get_title(): panel for panel in figure.axes}
    assert list(panels) == [
        f"{model}, seed 0"
        for model in ("van_gogh, esd, pruning off", "church, esd, pruning off", "van_gogh, esd, pruning on")
    ]
    lines = {line.get_label(): line for line in panels["van_gogh, esd, pruning off, seed 0"].get_lines()}
    assert list(lines) == ["random", "unlearndiff", "embedding"]
    assert lines["random"].get_xydata().tolist() == [[2, 0], [20, 0.25]]
    assert [line.get_linestyle() for line in lines.values()] == ["-", "-", "--"]
    assert len({line.get_color() for line in lines.values()}) == 3
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["random", "unlearndiff", "embedding"]


def test_the_attacks_experiment_is_every_attack_on_two_models_of_each_task() -> None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(collect.CONFIG_FOLDER), version_base="1.3"):
        told = job_overrides(compose("config", ["+experiment=attacks"], return_hydra_config=True))
    attacks = [next(word for word in job if word.startswith("attack=")) for job in told]
    # Composing every job takes long; the attacks of one model stand for those of all.
    jobs = collect.experiment_jobs("attacks", ["concept=church", "+method=esd"])
    assert len(jobs) == len({*attacks})
    names = {job["attack"]["_target_"].rpartition(".")[2] for job in jobs}
    every = {
        yaml.safe_load(path.read_text())["_target_"].rpartition(".")[2]
        for path in (collect.CONFIG_FOLDER / "attack").glob("*.yaml")
    }
    assert names == every - {"Transfer"}
    # Two presets each of the noise attack and of TINA.
    assert len(told) == len({*map(tuple, told)}) == 3 * 2 * (len(names) + 2)
    assert all(attacks.count(attack) == 3 * 2 for attack in attacks)


def write_summary(store: Path, run: str, content: dict[str, Any]) -> Path:
    """A summary in the store as a job writes it."""
    folder = store / "runs" / run
    folder.mkdir(parents=True)
    write_json(folder / "summary.json", checked({"schema": SCHEMA_VERSION, **content}))
    return folder / "summary.json"


BROKEN_SUMMARIES = {
    "empty": "",
    "half": '{"schema": 3, "run": ',
    "a list": "[1, 2]",
    "null": "null",
    "nothing": "{}",
    "of another shape": f'{{"schema": {SCHEMA_VERSION}, "choices": [], "identity": 5}}',
    "of another version": '{"schema": 1, "run": "x"}',
    "of a strange version": '{"schema": [], "run": "x"}',
    "binary": "\x00\xff",
}


@pytest.mark.parametrize("broken", BROKEN_SUMMARIES)
def test_a_broken_summary_hides_no_other(broken: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_summary(tmp_path, "good", {"run": "good"})
    (tmp_path / "runs" / "bad").mkdir()
    (tmp_path / "runs" / "bad" / "summary.json").write_text(BROKEN_SUMMARIES[broken], encoding="latin-1")
    assert [entry["run"] for entry in read_summaries(tmp_path)] == ["good"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert "left out" in line


def test_a_summary_with_another_number_is_left_out(tmp_path: Path) -> None:
    path = write_summary(tmp_path, "good", {"run": "good", "rates": {"base": 0.5}})
    path.write_text(path.read_text().replace("0.5", "0.9"))
    assert read_summaries(tmp_path) == []


def test_tables_say_that_runs_of_different_machines_threads_or_revisions_are_mixed(
    table1: list[dict[str, Any]], tmp_path: Path
) -> None:
    esd = {"eraser": "esd", "pruning": "off", "attack": "unlearndiff"}
    here = {"device": "cpu", "cpu": "A", "capability": "AVX2", "threads": 1, "git": {"revision": "a" * 40}}
    runs = [summary(table1[0], esd, run=run, attacked=[True]) | here | {"origins": {"edit": [here]}} for run in "ab"]
    assert mixtures(runs) == []
    alike = tables.write_tables(runs, "alike", tmp_path)[0].read_text()
    assert "Made at revision aaaaaaaaaaaa on cpu, A (AVX2), 1 thread; seeds 0." in alike
    other_edit = {**runs[1], "origins": {"edit": [{**here, "threads": 2}]}}
    (sentence,) = mixtures([runs[0], other_edit])
    assert "cpu, A (AVX2), 1 thread; cpu, A (AVX2), 2 threads" in sentence
    assert sentence in tables.write_tables([runs[0], other_edit], "mixed", tmp_path)[0].read_text()
    (sentence,) = mixtures([runs[0], {**runs[1], "git": {"revision": "b" * 40, "dirty": True}}])
    assert "aaaaaaaaaaaa, bbbbbbbbbbbb and changes" in sentence


def test_runs_by_other_code_are_told(table1: list[dict[str, Any]]) -> None:
    esd = {"eraser": "esd", "pruning": "off", "attack": "unlearndiff"}
    run = summary(table1[0], esd, run="a", attacked=[True])
    classes = {group: get_class(run["config"][group]["_target_"]) for group in collect.CODED_GROUPS}
    now = {group: {"code": code_of(found)} for group, found in classes.items()}
    assert collect.made_by_other_code({**run, "identity": now}) == []
    assert collect.made_by_other_code({**run, "identity": now | {"attack": {"code": "other"}}}) == ["attack"]
    gone = {**run["config"], "judge": {"_target_": "evaluation.judges.gone.Gone"}}
    assert collect.made_by_other_code({**run, "identity": now, "config": gone}) == ["judge"]


def test_summaries_are_read_newest_first(tmp_path: Path) -> None:
    for age, run in enumerate(("newest", "older")):
        write_summary(tmp_path, run, {"run": run})
        os.utime(tmp_path / "runs" / run / "summary.json", (1000 - age, 1000 - age))
    assert [entry["run"] for entry in read_summaries(tmp_path)] == ["newest", "older"]


def test_what_the_command_line_names_is_not_swept_over() -> None:
    jobs = collect.experiment_jobs("table1", ["concept=church", "attack=none,random"])
    chosen = {(job["concept"]["name"], job["attack"]["_target_"].rpartition(".")[2]) for job in jobs}
    assert chosen == {("church", "NoAttack"), ("church", "RandomTokens")}
    assert len({str(job) for job in jobs}) == len(jobs) == 6


def test_an_empty_store_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["eraselab", "tables", "demo", f"store={tmp_path}"])
    with pytest.raises(SystemExit) as exit_:
        console.main()
    assert str(exit_.value).startswith(f"The store {tmp_path} has no run of demo; make them with")


def test_measures_as_text() -> None:
    rate, mean = Rate.of([True, False]), Mean.of([1.0, 2.0])
    assert measure_text(rate.as_dict()) == str(rate)
    assert measure_text(mean.as_dict()) == str(mean)
    assert measure_text(0.12345) == "0.1235"
    assert measure_text(None) == ""
    assert (short_text(rate.as_dict()), short_text(mean.as_dict()), short_text(3.0)) == ("50 %", "1.50", "3")


def test_a_frontier_is_what_no_other_point_beats() -> None:
    points = [(0.9, 0.5), (0.8, 0.3), (0.8, 0.4), (0.7, 0.35), (0.95, 0.6), (0.6, 0.1)]
    assert figures.frontier(points, 1) == [(0.95, 0.6), (0.9, 0.5), (0.8, 0.3), (0.6, 0.1)]
    assert figures.frontier(points, -1) == [(0.6, 0.1)]


def test_tradeoffs_have_a_point_per_run_and_a_line_per_method(table1: list[dict[str, Any]]) -> None:
    def run(pruning: str, kept: list[bool], attacked: list[bool], concept: str = "van_gogh") -> dict[str, Any]:
        job = next(job for job in table1 if job["concept"]["name"] == concept)
        choices = {"eraser": "esd", "pruning": pruning, "attack": "random"}
        made = summary(job, choices, run=f"{pruning}{kept}", attacked=attacked)
        rate = Rate.of(kept).as_dict()
        return made | {"measures": {"accuracy_style": rate, "accuracy_subject": Rate.of([True]).as_dict(), "fid": 3.0}}

    all_four, half = [True] * 4, [True, False] * 2
    runs = [run("off", all_four, all_four), run("off", half, half), run("on", half, all_four, "church")]
    figure = figures.tradeoffs(runs)
    assert [panel.get_title() for panel in figure.axes] == ["van_gogh", "church"] * 2
    accuracy, church = figure.axes[:2]
    lines = {line.get_label(): line for line in accuracy.get_lines()}
    assert lines["esd"].get_xydata().tolist() == [[1, 1], [0.75, 0.5]]
    assert "esd, pruning on" not in lines
    assert [line.get_label() for line in church.get_lines()][-1] == "esd, pruning on"
    assert [text.get_text() for text in accuracy.texts] == ["esd", "better"]
    assert [text.get_text() for text in church.texts] == ["esd, pruning on", "better"]
    assert figure.axes[2].xaxis_inverted()
    assert not accuracy.xaxis_inverted()


def test_tradeoffs_stand_above_the_floor_where_all_runs_have_one(table1: list[dict[str, Any]], tmp_path: Path) -> None:
    def run(pruning: str, attacked: list[bool], kept: list[bool]) -> dict[str, Any]:
        choices = {"eraser": "esd", "pruning": pruning, "attack": "random"}
        made = summary(table1[0], choices, run=pruning, attacked=attacked)
        rates = {"accuracy_style": Rate.of(kept).as_dict(), "accuracy_subject": Rate.of(kept).as_dict(), "fid": 3.0}
        never = [True] + [False] * 3
        block = AboveFloor.of_pair(attacked, never).as_dict() | {"floor": Rate.of(never).as_dict(), "control": None}
        whole = {"accuracy_style": Rate.of([True]).as_dict(), "accuracy_subject": Rate.of([True]).as_dict(), "fid": 1.0}
        block |= {"ceiling": Rate.of([True] * 4).as_dict(), "calibrated": None, "measures": whole, "runs": {}}
        return made | {"measures": rates, "floor": block | {"knows": "never_church"}}

    runs = [run("off", [True] * 4, [True] * 4), run("on", [True, True, False, False], [True, False])]
    figure = figures.tradeoffs(runs)
    accuracy, fid = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in accuracy.get_lines()}
    assert lines["esd"] == [[1, 0.75]]
    assert lines["esd, pruning on"] == [[0.5, 0.25]]
    assert lines["_retrained"] == [[1, 0]]
    assert {line.get_label(): line.get_xydata().tolist() for line in fid.get_lines()}["_retrained"] == [[1, 0]]
    assert {text.get_text() for text in accuracy.texts} == {
        *("esd", "esd, pruning on", "retrained", "better"),
        "below 0: over-erased",
    }
    assert "excess over the floor" in figure.get_supylabel()
    paths = figures.write_figure(runs, "claim.x", tmp_path)
    assert [path.name for path in paths] == ["claim.x.png", "claim.x.pdf"]
    assert paths[1].read_bytes().startswith(b"%PDF")
    # One run without a floor, and rates are drawn as they are.
    assert "excess" not in figures.tradeoffs([*runs, {**runs[0], "floor": {}}]).get_supylabel()


def test_runs_from_before_prompt_sets_were_a_choice_are_found(tmp_path: Path) -> None:
    GlobalHydra.instance().clear()
    job, _ = collect.experiment_jobs("demo", [f"store={tmp_path}"])
    own = {key: job.pop(key) for key in ("prompt_set", "retained_set")}
    write_summary(tmp_path, "old", {"run": "old", "config": job})

    found, missing = collect.collect_runs("demo", [f"store={tmp_path}"])

    assert [run["run"] for run in found] == ["old"]
    assert found[0]["config"] == job | own
    assert len(missing) == 1
