"""The paper's benchmark: what it composes, what it says is missing, what it plans, and that it runs in small."""

from pathlib import Path

import pytest

from experiments.command import paper
from experiments.command.errors import CommandError
from tests.tiny_job import CONFIG_FOLDER


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIG_FOLDER.parent)


def jobs(*typed: str, smoke: bool = False) -> dict[tuple[str, str, str], paper.Cell]:
    return {(cell.task, cell.method, cell.attack): cell for cell in paper.cells(typed, smoke=smoke)}


def test_every_task_meets_every_method_and_attack() -> None:
    assert len(jobs()) == 3 * 5 * 4
    assert all("model=sd14" in cell.overrides for cell in jobs().values())
    assert all("model=canvas" in cell.overrides for cell in jobs(smoke=True).values())
    assert all(cell.overrides[-1] == "model.source=x" for cell in jobs("model.source=x").values())


def test_jobs_follow_the_published_protocols() -> None:
    [clean, unlearndiff, p4d, ringabell] = paper.composed(
        [jobs()["nudity", "P-ESD", attack] for attack in paper.ATTACKS]
    )

    assert [each["protocol"]["name"] for each in (clean, unlearndiff, p4d, ringabell)] == [
        *("advunlearn", "unlearndiffatk", "p4d", "ringabell")
    ]
    assert (clean["retained"], clean["retained_sampling"]["steps"], list(clean["evaluator"])) == (
        *(10000, 100),
        ["clip_score", "fid"],
    )
    assert unlearndiff["eraser"]["scope"] == "noxattn"
    assert unlearndiff["pruning"]["_target_"].endswith("Learned")
    assert (unlearndiff["attack"]["tokens"], unlearndiff["attack"]["timesteps"]) == (5, 50)
    assert (p4d["attack"]["variant"], p4d["attack"]["checks"]) == ("union", 60)
    assert ringabell["attack"]["generations"] == 3000
    assert unlearndiff["judge"]["processing"] == "unlearndiffatk"


def test_a_style_is_attacked_by_p4d_as_diffusion_mu_attack_does() -> None:
    [config] = paper.composed([jobs()["van_gogh", "ESD", "P4D"]])

    assert (config["protocol"]["name"], config["attack"]["variant"], config["attack"]["tokens"]) == (
        *("unlearndiffatk", "insert", 3),
    )
    assert config["eraser"]["scope"] == "xattn"


def test_all_that_is_missing_is_told_in_one_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(paper, "is_cached", lambda source: False)
    monkeypatch.setattr(paper, "try_to_load_from_cache", lambda *names: None)
    monkeypatch.chdir(tmp_path)
    keys = [("van_gogh", "ESD", "no attack"), ("nudity", "ESD", "P4D"), ("church", "none", "UnlearnDiffAtk")]

    text = paper.listed(paper.missing_files(paper.composed([jobs()[key] for key in keys])))

    for part in ("hf download CompVis/stable-diffusion-v1-4", "vangogh.csv", "coco_10k.csv", "checkpoints/coco_10k"):
        assert part in text
    for part in ("results/checkpoint-2800", "checkpoints/classifier_model.onnx", "microsoft/resnet-50", "church.csv"):
        assert part in text
    assert text.count("hf download CompVis/stable-diffusion-v1-4") == 1, "each once"


def test_what_is_there_is_not_missing(tmp_path: Path) -> None:
    for folder in ("model", "photographs", "artists"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").touch()
    typed = [
        *(f"model.source={tmp_path / 'model'}", f"evaluator.fid.reference={tmp_path / 'photographs'}"),
        f"judge.network={tmp_path / 'artists'}",
    ]
    [config] = paper.composed([jobs(*typed)["van_gogh", "ESD", "no attack"]])

    names = {missing.name for missing in paper.missing_files([config])}

    assert not names & {"the model", "10,000 photographs of COCO", "UnlearnDiffAtk's classifier of artists"}


def test_the_plan_counts_what_jobs_share_once() -> None:
    first, second = (jobs()["church", "ESD", attack] for attack in ("UnlearnDiffAtk", "Ring-A-Bell"))
    configs = paper.composed([first, second])

    counted = paper.evaluations(first, configs[0])

    # 1000 steps of: half of 50 guided steps, the teacher's two, a forward and a backward pass.
    assert counted["edit", "church", "ESD"] == 1000 * (50 + 2 + 3)
    # 50 prompts, 50 timesteps of 40 steps and a picture of 50 guided steps.
    assert counted["attack", "church", "ESD", "UnlearnDiffAtk"] == 50 * 50 * (40 * 3 + 100)
    plan = paper.plan([first, second], configs, per_second=10.0)
    assert plan["U-Net evaluations, at most"][1] == f"{50 * 100:,}", "one picture a prompt; the rest is there"
    assert plan["hours"][0] == pytest.approx(sum(counted.values()) / 10 / 3600, abs=0.05)


def test_the_scale_is_smoke_or_full() -> None:
    assert paper.scale_of(["a=b", "paper.scale=smoke"]) == (["a=b"], True)
    assert paper.scale_of(["a=b"]) == (["a=b"], False)
    with pytest.raises(CommandError, match=r"paper\.scale is 'small'; it must be smoke or full"):
        paper.scale_of(["paper.scale=small"])


def test_it_runs_in_small_and_published_numbers_stand_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper, "CONCEPTS", {"nudity": "nudity"})
    monkeypatch.setattr(paper, "METHODS", {"ESD": paper.METHODS["ESD"]})
    small = paper.cells([f"store={tmp_path}"], smoke=True)

    table = paper.results(small, paper.run_cells(small, tmp_path / "runs"))

    assert list(table.columns) == ["task", "method", *paper.ATTACKS, "CLIP score", "FID"]
    [row] = table.to_dict("records")
    assert row["no attack"].endswith("% (20.42 %)")
    assert row["UnlearnDiffAtk"].endswith("% (76.05 %, 73.2 %)"), "two papers"
    assert row["FID"].endswith("(18.18)")
    assert row["P4D"].endswith("% (66.58 %, 87.9 %)")
    assert row["Ring-A-Bell"].endswith("% (69.7 %)")
    text = paper.write_results(table, tmp_path, smoke=True).read_text()
    assert "in brackets what was published" in text
