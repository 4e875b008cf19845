"""Transfer: prompts found on one model, read back and judged on another."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from attacks.cases import Check, PromptCase
from attacks.embedding import EmbeddingAttack
from attacks.random_tokens import RandomTokens
from attacks.seed_search import SeedSearch
from attacks.transfer import FoundPrompt, Transfer, read_found, write_found
from diffusion.model import TextToImage
from diffusion.sampling import Sampling
from tests.attack_cases import make_cases
from tests.judges import never, one_in
from tests.test_paraphrase import SAMPLING
from tests.test_union import CASES, by_pixels

HEADER = "case_number,prompt,adversarial_prompt"


@pytest.mark.parametrize("attack", [RandomTokens(tries=3), SeedSearch(tries=3)], ids=["texts", "seeds"])
def test_found_prompts_are_judged_again_from_their_text_and_seed(
    attack: RandomTokens | SeedSearch, tiny_model64: TextToImage, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.csv"
    outcomes = {
        outcome.case_number: outcome for outcome in attack.run(tiny_model64, CASES, by_pixels, sampling=SAMPLING)
    }
    write_found(path, list(outcomes.values()))
    before = tiny_model64.unet_evaluations
    again = list(Transfer(found=path).run(tiny_model64, CASES, by_pixels, sampling=SAMPLING))
    assert len(again) == len(outcomes)
    for outcome in again:
        first = outcomes[outcome.case_number]
        assert outcome.adversarial_prompt == first.adversarial_prompt
        assert (outcome.success, outcome.plain_success) == (first.success, first.plain_success)
        assert outcome.image.equal(first.image)
        assert len(outcome.checks) == (1 if first.plain_success else 2)
    assert sum(outcome.unet_evaluations for outcome in again) == tiny_model64.unet_evaluations - before
    assert {outcome.success for outcome in outcomes.values() if not outcome.plain_success} == {True, False}


def test_outcomes_do_not_depend_on_batch_size_or_order(tiny_model64: TextToImage, tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    write_found(path, list(RandomTokens(tries=1).run(tiny_model64, CASES, never, sampling=SAMPLING)))
    attack = Transfer(found=path)
    alone = list(attack.run(tiny_model64, CASES, one_in(3), sampling=Sampling(steps=1, batch_size=1)))
    together = attack.run(tiny_model64, CASES[::-1], one_in(3), sampling=Sampling(steps=1, batch_size=8))
    by_number = {outcome.case_number: outcome for outcome in together}
    assert all(outcome == by_number[outcome.case_number] for outcome in alone)


def test_any_text_comes_back_as_it_was(tiny_model: TextToImage, tmp_path: Path) -> None:
    (outcome,) = RandomTokens(tries=1).run(tiny_model, CASES[:1], never, sampling=SAMPLING)
    texts = [' a "quoted", church\nof\r\nlines; é\t\x00 [x] ', "a\rb", "a\r", "=cmd", "'=cmd", "@SUM(A1)", "-1", "'"]
    texts += [f"a{chr(code)}b" for code in (*range(32), 0x7F, 0x85, 0x2028, 0xFEFF)]
    changed = [
        replace(outcome, case_number=number, adversarial_prompt=text, checks=(Check(text, 9, True, 0.5, None, 4),))
        for number, text in enumerate(texts)
    ]
    write_found(tmp_path / "prompts.csv", changed)
    found = read_found(tmp_path / "prompts.csv")
    assert found == {number: FoundPrompt("a church", text, 9) for number, text in enumerate(texts)}


@pytest.mark.parametrize("text", ["=cmd|'/c calc'!A1", "@SUM(1+1)", "+1", "-1+1", "\t=1"])
def test_a_spreadsheet_finds_no_formula_in_what_was_found(text: str, tiny_model: TextToImage, tmp_path: Path) -> None:
    (outcome,) = RandomTokens(tries=1).run(tiny_model, CASES[:1], never, sampling=SAMPLING)
    write_found(tmp_path / "prompts.csv", [replace(outcome, adversarial_prompt=text)])
    with (tmp_path / "prompts.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["adversarial_prompt"] == f"'{text}"


def test_what_was_found_without_a_text_is_refused(tiny_model: TextToImage, tmp_path: Path) -> None:
    attack = EmbeddingAttack(tokens=1, timesteps=1, steps_per_timestep=1)
    cases = make_cases(tiny_model, ["a church", "a fish"])
    write_found(tmp_path / "prompts.csv", list(attack.run(tiny_model, cases, never, sampling=SAMPLING)))
    with pytest.raises(ValueError, match=r"2 of 2 cases .*'embeddings after 1 steps' for case 10.*end in a text"):
        Transfer(found=tmp_path)


def test_a_person_may_write_the_file(tiny_model: TextToImage, tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(f"\ufeff{HEADER}\n1,a red fish,a scarlet tench\n0,a church,a chapel\n")
    outcomes = list(Transfer(found=path).run(tiny_model, CASES[:2], never, sampling=SAMPLING))
    assert [outcome.checks[-1].prompt for outcome in outcomes] == ["a chapel", "a scarlet tench"]
    assert [outcome.checks[-1].seed for outcome in outcomes] == [50, 51]


def test_a_runs_folder_and_its_summary_stand_for_its_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text(f"{HEADER}\n0,a church,a chapel\n")
    assert {Transfer(found=found).found for found in (tmp_path, tmp_path / "summary.json", str(path))} == {path}


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (PromptCase(7, "a church", 0, 3.0), r"has no case 7; attack the same prompts in both runs \(prompts=1 takes"),
        (PromptCase(0, "a fish", 0, 3.0), "case 0 is 'a church' in .*, but 'a fish' here"),
    ],
)
def test_cases_that_do_not_match_are_refused_before_any_picture(
    case: PromptCase, message: str, tiny_model: TextToImage, tmp_path: Path
) -> None:
    (tmp_path / "prompts.csv").write_text(f"{HEADER}\n0,a church,a chapel\n")
    with pytest.raises(ValueError, match=message):
        list(Transfer(found=tmp_path).run(tiny_model, [case], never, sampling=SAMPLING))
    assert tiny_model.unet_evaluations == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("case_number,prompt\n0,a church\n", "lacks the columns adversarial_prompt"),
        (f"{HEADER}\n", "has no prompts"),
        (f"{HEADER}\n0,a church\n", "broken in line 2"),
        (f"{HEADER}\n0,a church,a chapel,x\n", "broken in line 2"),
        (f"{HEADER}\n-1,a church,a chapel\n", "whole numbers from 0"),
        (f"{HEADER},evaluation_seed\n0,a church,a chapel,1.5\n", "evaluation_seed"),
        (f"{HEADER}\n0,a church,a chapel\n0,a church,x\n", "has case 0 twice, again in line 3"),
    ],
)
def test_broken_files_are_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        Transfer(found=tmp_path)


@pytest.mark.parametrize("found", ["nowhere", None, 3])
def test_a_missing_file_is_refused(found: object, tmp_path: Path) -> None:
    for value in (found, tmp_path):
        with pytest.raises(ValueError, match="which leads to no file"):
            Transfer(found=value)  # type: ignore[arg-type]
