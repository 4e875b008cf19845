"""What a job tells of its prompts: how many there are, which repeat others, are cut or are drawn in another size."""

from pathlib import Path
from typing import Any

import pytest

from attacks.p4d import P4D
from attacks.protocols import Attack
from attacks.random_tokens import RandomTokens
from attacks.ringabell import RingABell
from attacks.seed_search import SeedSearch
from attacks.union import Union, inserted_tokens
from diffusion.model import TextToImage
from diffusion.prompt_template import PromptTemplate
from evaluation.prompt_sets import PromptRow
from evaluation.statistics import Rate
from experiments.job.prompts import PromptCounts, require_size, tokens_cut
from tests.tiny_job import run

HEADER = "case_number,prompt,evaluation_seed,evaluation_guidance"


def command(world: Path, folder: Path, prompts: Path, *more: str) -> list[str]:
    return [
        *("~model", "+model._target_=tests.tiny_job.Float64Folder", f"+model.source={world / 'model'}"),
        *("~judge", "+judge._target_=tests.tiny_job.ErraticJudge", "evaluator=none", "tracker=off"),
        *(f"concept.prompts={prompts}", f"concept.retained_prompts={world / 'retained.csv'}"),
        *(f"store={folder / 'store'}", "eraser=none", "attack=none", "sampling.steps=1", "prompts=5", "retained=4"),
        *more,
    ]


def write(folder: Path, *rows: str, header: str = HEADER) -> Path:
    path = folder / "prompts.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def long_prompt(model: TextToImage, tokens: int) -> str:
    """A prompt of this many tokens, start and end included."""
    per_word = model.token_counts(["red"])[0] - 2
    words = ["red"] * ((tokens - 2) // per_word) + ["a"] * ((tokens - 2) % per_word)
    prompt = " ".join(words)
    assert model.token_counts([prompt]) == [tokens]
    return prompt


def test_a_job_counts_its_prompts_in_log_summary_and_table(
    world: Path, tiny_model: TextToImage, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    most = tiny_model.max_tokens
    prompts = [long_prompt(tiny_model, most + 3), long_prompt(tiny_model, most - 1), "a church", "a church"]
    path = write(tmp_path, *(f"{number},{prompt},7,{min(number, 3) / 2}" for number, prompt in enumerate(prompts)))
    attack = ["attack=random", "attack.tries=1", "attack.tokens=2"]
    summary = run(command(world, tmp_path, path, *attack), tmp_path / "run")

    counts = summary["sets"]["prompts"]
    assert (counts["asked"], counts["taken"], counts["distinct"], counts["pictures"]) == (5, 4, 3, 4)
    assert (counts["cut"], counts["below_guidance"], counts["other_size"]) == (1, 2, 0)
    assert [case["cut"] for case in summary["cases"]] == [3, 0, 0, 0]
    attacked = [case["pictures"] > 1 for case in summary["cases"]]
    assert [case["attack_cut"] > case["cut"] for case in summary["cases"][:2]] == attacked[:2]
    assert counts["cut_by_attack"] == sum(case["attack_cut"] > 0 == case["cut"] for case in summary["cases"])

    log = caplog.text
    assert "there are 4 prompts, fewer than the 5 asked for (prompts=5)" in log
    assert "of 4 prompts 3 are distinct (4 distinct pictures)" in log
    assert f"1 of 4 prompts are longer than the {most} tokens that" in log
    assert "the attack's tokens push the ends of 1 of 4 prompts out" in log
    assert "2 of 4 prompts have a guidance scale below 1" in log
    assert "retained prompts" not in log.replace("4 retained prompts", "")
    shown = " ".join(capsys.readouterr().out.split())
    assert "4 of 5 asked for, 3 of 4 distinct, 1 cut at the text encoder's length" in shown


def test_thirty_equal_rows_are_one_prompt(world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, *(f"{number},a church,7,3" for number in range(30)))
    summary = run(command(world, tmp_path, path, "prompts=30"), tmp_path / "run")
    assert "of 30 prompts 1 are distinct (1 distinct pictures)" in caplog.text
    alone = Rate.of([bool(summary["rates"]["attacked"]["rate"])])
    for name in ("base", "erased", "attacked"):
        rate = summary["rates"][name]
        assert (rate["n"], rate["groups"]) == (30, 1)
        assert (rate["low"], rate["high"]) == pytest.approx((alone.low, alone.high))
    assert summary["protocol"]["success"]["groups"] == 1


def test_a_set_without_faults_says_nothing(
    world: Path, tiny_model: TextToImage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = run(command(world, tmp_path, world / "concept.csv"), tmp_path / "run")
    counts = PromptCounts(asked=5, taken=5, distinct=5, pictures=5)
    assert summary["sets"]["prompts"] == counts.as_dict()
    assert list(counts.sentences(tiny_model)) == []
    assert "groups" not in summary["rates"]["base"]
    assert "asked for" not in capsys.readouterr().out


def test_rows_of_another_size_are_refused_by_case_or_drawn_and_told(
    world: Path, tiny_model: TextToImage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    height, width = tiny_model.image_size
    header = "case_number,prompt,sd_image_width,sd_image_height"
    rows = [f"1,a church,{width},{height}", f"2,a fish,{2 * width},{height}", "3,a dog,,", f"4,a cat,{width},7"]
    path = write(tmp_path, *rows, header=header)
    with pytest.raises(ValueError, match="2 of 4 prompts ask for pictures of another size") as error:
        run(command(world, tmp_path, path, "prompts=4"), tmp_path / "run")
    assert f"case 2 ({2 * width}x{height}), case 4 ({width}x7); set model.resolution" in str(error.value)
    assert "prompt_set.other_sizes=draw" in str(error.value)
    drawn = run(command(world, tmp_path, path, "prompts=4", "prompt_set.other_sizes=draw"), tmp_path / "run")
    assert drawn["sets"]["prompts"]["other_size"] == 2
    assert f"2 of 4 prompts ask for pictures of another size; all are drawn with {width}x{height} pixels" in caplog.text


def test_many_rows_of_another_size_are_summed_up(tiny_model: TextToImage) -> None:
    rows = [PromptRow(number, "a church", width=4) for number in range(9)]
    with pytest.raises(ValueError, match=r"case 2 \(4xany\) and 6 more"):
        require_size(rows, tiny_model, "prompt_set")


@pytest.mark.parametrize("spare", [0, 1, 2, 5])
@pytest.mark.parametrize("insertion", ["prefix_k", "suffix_k", "mid_k", "insert_k", "per_k_words"])
def test_what_an_attack_pushes_out_is_what_its_template_loses(
    tiny_model: TextToImage, spare: int, insertion: Any
) -> None:
    prompt = long_prompt(tiny_model, tiny_model.max_tokens - spare)
    attack = RandomTokens(tokens=3, insertion=insertion)
    [(cut, beside)] = tokens_cut(tiny_model, [prompt], attack)
    template = PromptTemplate.insert(tiny_model, [prompt], 3, insertion)
    kept = int(template.ends[0]) - 1 - 3
    assert (cut, beside) == (0, tiny_model.token_counts([prompt])[0] - 2 - kept)


@pytest.mark.parametrize("length", [0, 1, 3, 8])
def test_tokens_that_attacks_put_beside_a_prompt_are_known(tiny_model: TextToImage, length: int) -> None:
    p4d = P4D(variant="p4d_k", every=3)
    template = PromptTemplate.insert_every(tiny_model, [long_prompt(tiny_model, length + 2)], 3)
    assert inserted_tokens(p4d, length) == int((template.slots < tiny_model.max_tokens).sum())
    assert inserted_tokens(P4D(variant="p4d_n"), length) == 0
    assert inserted_tokens(P4D(variant="insert", tokens=5), length) == 5
    assert inserted_tokens(RingABell(pairs=[("a", "b")]), length) == inserted_tokens(SeedSearch(), length) == 0
    members: dict[str, Attack] = {"random": RandomTokens(tokens=2), "seeds": SeedSearch()}
    assert inserted_tokens(Union(members), length) == 2
    assert inserted_tokens(Union(members), length, "seeds") == 0
