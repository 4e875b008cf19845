"""The claim's table: the right pairs, a prompt's mean over seeds, and every shortfall named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import t

from evaluation.floors import TwoWay
from experiments.command import console
from experiments.command.collect import experiment_jobs
from experiments.job.store import SCHEMA_VERSION, checked, write_json
from experiments.results import claim


def run(
    attacked: list[bool],
    *,
    pruning: str = "off",
    seed: int = 0,
    concept: str = "church",
    eraser: str = "esd",
    style: float = 0.9,
    clip: float = 80.0,
    fid: float = 50.0,
    warnings: tuple[str, ...] = (),
) -> dict[str, Any]:
    return {
        "run": f"{concept}-{eraser}-{pruning}-{seed}",
        "warnings": list(warnings),
        "concept": concept,
        "seed": seed,
        "choices": {"eraser": eraser, "pruning": pruning, "attack": "unlearndiff"},
        "cases": [{"case_number": number, "attacked": success} for number, success in enumerate(attacked)],
        "measures": {
            "accuracy_style": {"rate": style},
            "accuracy_subject": {"rate": 0.8},
            "clip_score": {"mean": clip},
            "fid": fid,
        },
    }


def test_pairs_are_of_one_concept_eraser_and_seed() -> None:
    unpruned = [run([True], seed=seed, eraser=eraser) for seed in (0, 1) for eraser in ("esd", "ac")]
    pruned = [run([True], seed=1, pruning="on"), run([True], seed=2, pruning="on")]
    assert claim.method_pairs([*unpruned, *pruned]) == [(pruned[0], unpruned[2])]


def test_a_run_with_a_warning_supports_no_claim_and_is_named(tmp_path: Path) -> None:
    sound = [run([True] * 20), run([False] * 20, pruning="on")]
    doubtful = [run([True] * 20, seed=1), run([False] * 20, pruning="on", seed=1, warnings=("No base.",))]
    assert claim.method_pairs([*doubtful, *sound]) == [(sound[1], sound[0])]
    written = claim.write_claim([*doubtful, *sound], "mine", tmp_path, missing=[]).read_text()
    assert "- (!) church-esd-on-1: No base." in written


def test_a_prompt_counts_once_with_its_mean_over_the_seeds() -> None:
    pairs = [
        (run([False, False, True, False], pruning="on"), run([True, True, True, False])),
        (run([False, True, True, False], pruning="on", seed=1), run([True, True, True, True], seed=1)),
    ]
    found = claim.Comparison.of(pairs)
    assert found.lower_by.n == 4
    assert found.unpruned.mean == pytest.approx((100 + 100 + 100 + 50) / 4)
    assert found.pruned.mean == pytest.approx((0 + 50 + 100 + 0) / 4)
    assert found.lower_by.mean == pytest.approx((100 + 50 + 0 + 50) / 4)
    # The erasure is the unit: with two of them an interval over prompts alone would be too narrow.
    by_seed = np.array([[100, 100, 0, 0], [100, 0, 0, 100]])
    variance, degrees = TwoWay.of(by_seed).of_mean()
    assert found.lower_by.high - found.lower_by.mean == pytest.approx(t.ppf(0.975, degrees) * variance**0.5)
    assert found.lower_by.mean - found.lower_by.low == pytest.approx(found.lower_by.high - found.lower_by.mean)


def test_prompts_of_several_concepts_are_apart() -> None:
    pairs = [
        (run([False], pruning="on"), run([True])),
        (run([True], pruning="on", concept="fire"), run([True], concept="fire")),
    ]
    assert claim.Comparison.of(pairs).lower_by.n == 2
    other = (run([True, False], pruning="on", seed=1), run([True, False], seed=1))
    with pytest.raises(ValueError, match="Seed 0 was not attacked on the prompts of the others"):
        claim.Comparison.of([pairs[0], other])


def test_shortfalls_are_named() -> None:
    good = claim.Comparison.of([(run([False] * 20, pruning="on"), run([True] * 20))])
    assert good.shortfalls == []
    worse = run([False] * 15 + [True] * 5, pruning="on", style=0.86, clip=79.0, fid=56.0)
    bad = claim.Comparison.of([(worse, run([False] * 10 + [True] * 10))])
    assert (bad.style, bad.clip, bad.fid) == (pytest.approx(-4), pytest.approx(-1.25), pytest.approx(12))
    assert bad.lower_by.mean == 25
    assert bad.shortfalls == ["intervals apart", "style", "CLIP score", "FID"]
    better = run([False] * 20, pruning="on", style=1.0, clip=90.0, fid=10.0)
    assert claim.Comparison.of([(better, run([True] * 20))]).shortfalls == []


def test_a_row_per_concept_and_one_over_all() -> None:
    table = claim.claim_table(
        [
            run([True] * 20),
            run([False] * 20, pruning="on"),
            run([True] * 20, concept="fire"),
            run([False] * 20, pruning="on", concept="fire", fid=70.0),
        ]
    )
    assert list(table["concept"]) == ["church", "fire", "all"]
    assert list(table["erasures"]) == [1, 1, 1]
    assert list(table["prompts"]) == [20, 20, 40]
    assert list(table["falls short in"]) == ["nothing", "FID", "FID"]
    assert table["lower by"][2] == "100 [100, 100]"
    # Concepts that were erased with other seeds make no row together.
    more = [run([True] * 20, seed=1), run([False] * 20, pruning="on", seed=1)]
    fire = [run([True] * 20, concept="fire"), run([False] * 20, pruning="on", concept="fire")]
    table = claim.claim_table([run([True] * 20), run([False] * 20, pruning="on"), *more, *fire])
    assert list(zip(table["concept"], table["erasures"], strict=True)) == [("church", 2), ("fire", 1)]


def test_the_command_writes_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "store"
    # Two of the four methods were run.
    overrides = [f"store={store}", "concept=church", "seed=0"]
    jobs = [job for job in experiment_jobs("claim", overrides) if job["eraser"]["_target_"].endswith("ESD")]
    assert len(jobs) == 2
    for job in jobs:
        pruning = "off" if job["pruning"]["_target_"].endswith("Off") else "finetuned"
        (store / "runs" / pruning).mkdir(parents=True)
        made = {**run([True, pruning == "off"], pruning=pruning), "config": job, "schema": SCHEMA_VERSION}
        write_json(store / "runs" / pruning / "summary.json", checked(made))
    monkeypatch.setattr("sys.argv", ["eraselab", "claim", "claim", *overrides, "--folder", str(tmp_path / "results")])
    console.main()
    text = (tmp_path / "results" / "claim_concept=church_seed=0_comparison.md").read_text()
    assert "| esd, pruning finetuned | church    | 1" in text
    assert "runs are missing" in text
