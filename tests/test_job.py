"""Whole jobs: what is made once, what survives a kill, what the summary says."""

import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from attacks.cases import Check, Outcome
from attacks.p4d import P4D
from diffusion.model import TextToImage
from evaluation.prompt_sets import PromptRow
from experiments.job.summary import success_curve
from experiments.results import grid
from tests import tiny_job
from tests.night import all_but
from tests.tiny_job import overrides, run


def numbers(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary without what differs between two equal runs: time, memory, paths."""
    costs = {stage: cost["unet_evaluations"] for stage, cost in summary["costs"].items()}
    same = {
        key: summary[key] for key in ("run", "n", "rates", "measures", "curve", "cases", "identity", "threat_model")
    }
    return same | {"costs": costs, "edit": summary["edit"]["hash"]}


def test_in_the_undisturbed_job_some_plain_prompts_and_some_attacks_succeed(undisturbed: dict[str, Any]) -> None:
    kinds = {(case["erased"], case["attacked"]) for case in undisturbed["cases"]}
    assert kinds >= {(True, True), (False, True)}
    assert all((case["pictures"] == 1) == case["erased"] for case in undisturbed["cases"])


def test_the_second_run_takes_everything_from_the_store(
    world: Path, undisturbed: dict[str, Any], model: TextToImage, tmp_path: Path
) -> None:
    again = run(overrides(world, undisturbed["store"]), tmp_path)
    assert model.unet_evaluations == 0
    assert again["costs"] == undisturbed["costs"]
    assert numbers(again) == numbers(undisturbed)


def test_batch_sizes_of_pictures_and_attacks_are_no_part_of_any_hash(
    world: Path, undisturbed: dict[str, Any], model: TextToImage, tmp_path: Path
) -> None:
    sizes = ["sampling.batch_size=5", "attack.batch_size=3"]
    again = run([*overrides(world, undisturbed["store"]), *sizes], tmp_path)
    assert model.unet_evaluations == 0
    assert again["run"] == undisturbed["run"]


def test_outcomes_are_the_same_whatever_the_batch_sizes(
    world: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    sizes = ["sampling.batch_size=5", "attack.batch_size=3", "eraser.sampling_batch_size=8"]
    other = numbers(run([*overrides(world, tmp_path / "store"), *sizes], tmp_path / "run"))
    # In single precision the batches of what is trained on would show in the edit, which is named after them.
    names = {"run", "identity", "edit"}
    assert {key: value for key, value in other.items() if key not in names} == {
        key: value for key, value in numbers(undisturbed).items() if key not in names
    }
    assert other["edit"] != undisturbed["edit"]["hash"]


def test_a_sweep_over_attacks_erases_once(
    world: Path, undisturbed: dict[str, Any], model: TextToImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise RuntimeError("erased again")

    monkeypatch.setattr("erasure.erasers.esd.ESD.erase", forbidden)
    command = [part for part in overrides(world, undisturbed["store"]) if not part.startswith("attack.")]
    plain = run([*command, "attack=none"], tmp_path / "none")
    assert plain["rates"]["attacked"] == plain["rates"]["erased"] == undisturbed["rates"]["erased"]
    assert plain["edit"]["hash"] == undisturbed["edit"]["hash"]


def test_an_attack_that_aims_at_the_unedited_model_is_given_it(
    world: Path, undisturbed: dict[str, Any], model: TextToImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    attack = P4D.run

    def recorded(self: P4D, *arguments: Any, original: TextToImage, **named: Any) -> Iterator[Outcome]:
        given.append((original.fingerprint(), model.fingerprint()))
        return attack(self, *arguments, original=original, **named)

    monkeypatch.setattr(P4D, "run", recorded)
    weights = model.fingerprint()
    command = [part for part in overrides(world, undisturbed["store"]) if not part.startswith("attack.")]
    command += ["attack=p4d", "attack.tokens=3", "attack.checks=1", "attack.steps_per_check=1"]
    summary = run(command, tmp_path)
    # The checks before the job call it on the unedited model, and ask for no outcome.
    checked, (original, edited) = given
    assert checked == (weights, weights)
    assert original == weights != edited
    assert model.unet_evaluations < summary["costs"]["attack"]["unet_evaluations"]
    assert summary["edit"]["hash"] == undisturbed["edit"]["hash"]


def test_verdicts_belong_to_the_weights_of_their_judge_wherever_they_lie(
    world: Path, model: TextToImage, tmp_path: Path
) -> None:
    command = [part for part in overrides(world, tmp_path / "store") if not part.startswith(("eraser.", "attack."))]
    command += ["eraser=none", "attack=none"]
    runs = []
    for name, remainder in (("first", 0), ("elsewhere", 0), ("retrained", 2)):
        weights = tmp_path / name
        weights.write_text(str(remainder))
        runs.append(run([*command, f"+judge.weights={weights}"], tmp_path / f"run-{name}"))
    first, elsewhere, retrained = runs
    assert elsewhere["run"] == first["run"]
    assert retrained["run"] != first["run"]
    assert retrained["cases"] != first["cases"]


def test_a_judges_labels_are_counted_for_each_rate(
    world: Path, undisturbed: dict[str, Any], model: TextToImage, tmp_path: Path
) -> None:
    command = [*overrides(world, undisturbed["store"]), "judge._target_=tests.tiny_job.LabellingJudge"]
    summary = run(command, tmp_path / "first")
    assert summary["rates"] == undisturbed["rates"]
    for name, rate in summary["rates"].items():
        counts = summary["labels"][name]
        assert counts["A"] == {"pictures": rate["successes"], "detections": rate["successes"]}
        b = counts.get("B", {"pictures": 0, "detections": 0})
        assert b["detections"] == 2 * b["pictures"] <= 2 * rate["successes"]
    assert any("B" in counts for counts in summary["labels"].values())
    assert undisturbed["labels"] == {}

    evaluations = model.unet_evaluations
    assert run(command, tmp_path / "second")["labels"] == summary["labels"]
    assert model.unet_evaluations == evaluations


def attacked_by(world: Path, store: Path, *attack: str) -> list[str]:
    """The command line of the small job with another attack."""
    return [*(part for part in overrides(world, store) if not part.startswith("attack.")), *attack]


UNION = ("attack=[random,seed_search]", "attack.members.random.tries=2", "attack.members.seed_search.tries=2")


def test_a_list_of_attacks_reports_the_worst_case_and_who_broke_what(
    world: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    store = undisturbed["store"]
    union = run(attacked_by(world, store, *UNION), tmp_path / "union")
    alone = [
        run(attacked_by(world, store, f"attack={name}", "attack.tries=2"), tmp_path / name)
        for name in ("random", "seed_search")
    ]
    assert union["choices"]["attack"] == "random+seed_search"
    assert union["threat_model"] == "black_box"
    for case, *others in zip(union["cases"], *(summary["cases"] for summary in alone), strict=True):
        assert case["attacked"] == any(other["attacked"] for other in others)
        breaker = next((name for name, other in zip(union["members"], others, strict=True) if other["attacked"]), "")
        assert case["broken_by"] == ("" if case["erased"] else breaker)
    by_member = {name: rate["successes"] for name, rate in union["members"].items()}
    assert list(by_member) == ["random", "seed_search"]
    newly = union["rates"]["attacked"]["successes"] - union["rates"]["erased"]["successes"]
    assert sum(by_member.values()) == newly > 0
    other_order = run(attacked_by(world, store, "attack=[seed_search,random]", *UNION[1:]), tmp_path / "order")
    assert other_order["run"] != union["run"]
    assert other_order["rates"] == union["rates"]


def test_a_killed_union_ends_with_the_numbers_of_an_undisturbed_one(world: Path, tmp_path: Path) -> None:
    command = attacked_by(world, tmp_path / "store", *UNION)
    _kill(command, tmp_path, "experiments.job.outcomes:write_picture", 4)
    (journal,) = (tmp_path / "store" / "attacks").glob("*/outcomes.jsonl")
    assert len(journal.read_text().splitlines()) == 3
    resumed = run(command, tmp_path / "again")
    assert numbers(resumed) == numbers(run(attacked_by(world, tmp_path / "other", *UNION), tmp_path / "undisturbed"))


def test_prompts_of_a_run_are_judged_again_on_another_model(
    world: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    store = undisturbed["store"]
    same = run(attacked_by(world, store, f"transfer={undisturbed['run']}"), tmp_path / "same")
    assert same["rates"] == undisturbed["rates"]
    assert [case["adversarial_prompt"] for case in same["cases"]] == [
        case["adversarial_prompt"] for case in undisturbed["cases"]
    ]
    file = tmp_path / "elsewhere.csv"
    file.write_bytes((store / "runs" / undisturbed["run"] / "prompts.csv").read_bytes())
    assert run(attacked_by(world, store, f"transfer={file}"), tmp_path / "copy")["run"] == same["run"]
    file.write_text(file.read_text().replace("a church", "a chapel"))
    with pytest.raises(ValueError, match="both runs must attack the same prompts"):
        run(attacked_by(world, store, f"transfer={file}", "seed=1"), tmp_path / "other")


def test_the_screen_shows_prompts_that_were_found_and_where_all_are(
    world: Path, undisturbed: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run(overrides(world, undisturbed["store"]), tmp_path)
    shown = capsys.readouterr().out.splitlines()
    found = [case["adversarial_prompt"] for case in undisturbed["cases"] if case["attacked"] and not case["erased"]]
    assert [line.removeprefix("found: ") for line in shown if line.startswith("found: ")] == found
    assert f"prompts: {undisturbed['store'] / 'runs' / undisturbed['run'] / 'prompts.csv'}" in shown


def test_another_seed_erases_again(world: Path, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    other = run([*overrides(world, undisturbed["store"]), "seed=1"], tmp_path)
    assert other["edit"]["hash"] != undisturbed["edit"]["hash"]
    assert other["costs"]["base"] == undisturbed["costs"]["base"]


def test_more_prompts_attack_the_new_ones_alone(
    world: Path, undisturbed: dict[str, Any], model: TextToImage, tmp_path: Path
) -> None:
    more = run([*overrides(world, undisturbed["store"]), "prompts=6"], tmp_path)
    assert more["cases"][:5] == undisturbed["cases"]
    one_picture = 2 * 2
    # The base and the plain picture of the sixth prompt, and its attack.
    assert model.unet_evaluations == 2 * one_picture + more["cases"][5]["unet_evaluations"]


def test_the_unedited_model_shares_the_base_pictures(world: Path, model: TextToImage, tmp_path: Path) -> None:
    command = [part for part in overrides(world, tmp_path / "store") if not part.startswith(("eraser.", "attack."))]
    summary = run([*command, "eraser=none", "attack=none"], tmp_path / "run")
    assert summary["artefacts"]["base"] == summary["artefacts"]["erased"]
    assert summary["rates"]["base"] == summary["rates"]["erased"]
    expected = {"hash": "none", "content": "none", "size_bytes": 0}
    assert {name: summary["edit"][name] for name in expected} == expected


def test_a_pruned_job_is_compared_with_its_unpruned_twin(
    world: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    pruned = run([*overrides(world, undisturbed["store"]), "pruning=on", "pruning.steps=3"], tmp_path / "a")
    assert pruned["unpruned"]["run"] == undisturbed["run"]
    discordant = [
        [one["attacked"] and not two["attacked"], two["attacked"] and not one["attacked"]]
        for one, two in zip(pruned["cases"], undisturbed["cases"], strict=True)
    ]
    only_first, only_second = (sum(column) for column in zip(*discordant, strict=True))
    comparison = pruned["unpruned"]["attacked"]
    assert (comparison["only_first"], comparison["only_second"]) == (only_first, only_second)
    other_seed = run(
        [*overrides(world, undisturbed["store"]), "pruning=on", "pruning.steps=3", "seed=7"], tmp_path / "b"
    )
    assert other_seed["unpruned"] is None


def test_the_summary_says_what_made_it(undisturbed: dict[str, Any]) -> None:
    assert undisturbed["choices"]["eraser"] == "esd"
    assert undisturbed["threat_model"] == "white_box"
    assert undisturbed["versions"]["torch"] == torch.__version__.partition("+")[0] or undisturbed["versions"]["torch"]
    assert undisturbed["config"]["eraser"]["steps"] == 6
    assert set(undisturbed["costs"]) == {"base", "edit", "erased", "attack", "measures"}
    assert undisturbed["costs"]["base"]["unet_evaluations"] == (5 + 4) * 2 * 2
    assert undisturbed["costs"]["attack"]["unet_evaluations"] == sum(
        case["unet_evaluations"] for case in undisturbed["cases"]
    )
    stored = undisturbed["store"] / "runs" / undisturbed["run"] / "summary.json"
    assert json.loads(stored.read_text())["run"] == undisturbed["run"]


KILLS = {
    "base pictures": ("experiments.job.pictures:write_picture", 4),
    "training": ("erasure.trajectories:FrozenSamples.batch", 4),
    "edit": ("experiments.job.store:Store.write_result", 1),
    "attack": ("experiments.job.outcomes:write_picture", 3),
    "summary": ("experiments.job.work:write_json", 2),
}


@pytest.mark.parametrize("stage", all_but({"training", "attack", "summary"}, KILLS))
def test_a_killed_job_ends_with_the_numbers_of_an_undisturbed_one(
    stage: str, world: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    name, call = KILLS[stage]
    _kill(overrides(world, tmp_path / "store"), tmp_path, name, call)
    assert numbers(run(overrides(world, tmp_path / "store"), tmp_path / "again")) == numbers(undisturbed)


def test_a_job_killed_while_it_writes_an_outcome_drops_the_torn_line(
    world: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    _kill(overrides(world, tmp_path / "store"), tmp_path, "experiments.job.journal:Journal.append", 3, torn=True)
    (journal,) = (tmp_path / "store" / "attacks").glob("*/outcomes.jsonl")
    assert not journal.read_text().endswith("\n")
    assert numbers(run(overrides(world, tmp_path / "store"), tmp_path / "again")) == numbers(undisturbed)


def _kill(command: list[str], folder: Path, name: str, call: int, *, torn: bool = False) -> None:
    # A fork server imports once; forking this process, with its thread pools, would not be safe.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.tiny_job"])
    arguments = (command, folder / "killed", name, call)
    process = context.Process(target=tiny_job.run_and_die, args=arguments, kwargs={"torn": torn})
    process.start()
    process.join()
    assert process.exitcode == -9


def outcome(presences: list[bool], evaluations: list[int]) -> Outcome:
    checks = tuple(
        Check("text", 3, present, 0.5, None, spent) for present, spent in zip(presences, evaluations, strict=True)
    )
    image = torch.full((3, 4, 4), 7, dtype=torch.uint8)
    return Outcome(0, "plain", "adversarial", presences[0], presences[-1], 0.5, checks, evaluations[-1], image)


def test_success_curve_counts_prompts_that_have_succeeded_by_then() -> None:
    outcomes = [outcome([True], [4]), outcome([False, False, True], [4, 10, 16]), outcome([False, False], [4, 10])]
    points = [(point.attempts, point.unet_evaluations, point.rate) for point in success_curve(outcomes)]
    assert points == [(0, 12, 1 / 3), (1, 24, 1 / 3), (2, 30, 2 / 3)]


def test_the_grid_shows_verdicts_and_enlarged_pictures() -> None:
    rows = [PromptRow(number, "a church", 1, 3.0) for number in range(9)]
    pictures = torch.zeros((9, 3, 32, 32), dtype=torch.uint8)
    outcomes = [outcome([False, True], [4, 8])] * 9
    drawn = grid.draw(rows, pictures, pictures, outcomes, [True] * 9)
    colours = {colour: count for count, colour in drawn.getcolors(maxcolors=100_000)}
    # Eight rows of black 160x160 pictures in the columns base and erased, the last pictures judged in the third.
    assert colours[0, 0, 0] == 8 * 2 * 160 * 160
    assert colours[7, 7, 7] == 8 * 160 * 160
