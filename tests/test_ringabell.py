"""Ring-A-Bell against a slow second implementation, what it encodes, and what batches may not change."""

import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from pydantic import ValidationError

from attacks.cases import Outcome, PromptCase
from attacks.prompt_pairs import read_pairs, resolve_pairs
from attacks.ringabell import RingABell, concept_vector, crossover, fitness, mutate
from diffusion.model import TextToImage
from diffusion.sampling import Sampling
from diffusion.streams import stream
from experiments.command.errors import CommandError
from experiments.job.stages import Stages
from experiments.job.store import Store
from tests.attack_cases import assert_same_outcomes
from tests.judges import never, one_in
from tests.oracles import ringabell as oracle
from tests.tiny_job import CONFIG_FOLDER, make_job, method_config

PAIRS = (("a van gogh painting of a church", "a picture of a church"), ("a fish by van gogh", "a fish"))
PROMPTS = ["a church", "a photo of a red church in the snow", "", "a golf ball in van gogh style", "two blue fish"]
CASES = [PromptCase(10 + index, prompt, seed=100 + index, guidance=3.0) for index, prompt in enumerate(PROMPTS)]
SAMPLING = Sampling(steps=2, batch_size=4)
by_pixels = one_in(3)
SMALL = {"pairs": PAIRS, "tokens": 4, "population": 10, "generations": 5}


def run(model: TextToImage, judge=never, cases: Sequence[PromptCase] = CASES, **fields) -> dict[int, Outcome]:
    """Outcomes by case number."""
    outcomes = list(RingABell(**{**SMALL, **fields}).run(model, cases, judge, sampling=SAMPLING))
    assert len(outcomes) == len(cases)
    return {outcome.case_number: outcome for outcome in outcomes}


def count_encoded(model: TextToImage) -> Counter:
    """Count from now on how often the text encoder meets each row of ids."""
    encoded, encode_ids = Counter(), model.encode_ids
    model.encode_ids = lambda ids: (encoded.update(map(tuple, ids.tolist())), encode_ids(ids))[1]
    return encoded


@pytest.mark.parametrize("mutated", ["all", "children"])
def test_search_agrees_with_the_slow_implementation(tiny_model64: TextToImage, mutated: str) -> None:
    model = tiny_model64
    rates = {"crossover_rate": 0.6, "mutation_rate": 0.4}
    outcomes = run(model, cases=CASES[:2], mutated=mutated, eta=2.0, **rates)
    for case in CASES[:2]:
        target = oracle.pushed(model, case.prompt, 2.0, oracle.direction(model, list(PAIRS)))
        tokens, distance = oracle.search(
            model,
            target,
            stream(0, "ringabell/evolution", case.case_number),
            tokens=4,
            population=10,
            generations=5,
            parents_mutate=mutated == "all",
            **rates,
        )
        found = outcomes[case.case_number]
        assert found.adversarial_prompt == model.tokenizer.decode(tokens).strip()
        assert found.checks[-1].loss == pytest.approx(distance, rel=1e-9)


def test_the_concept_vector_is_the_mean_difference_of_the_pairs(tiny_model64: TextToImage) -> None:
    vector = concept_vector(tiny_model64, PAIRS)
    expected = torch.tensor(oracle.direction(tiny_model64, list(PAIRS)), dtype=torch.float64)
    torch.testing.assert_close(vector, expected, rtol=0, atol=1e-12)


def test_a_pair_that_is_listed_twice_weighs_twice(tiny_model64: TextToImage) -> None:
    once, other = (concept_vector(tiny_model64, [pair]) for pair in PAIRS)
    both = concept_vector(tiny_model64, [PAIRS[0], *PAIRS])
    torch.testing.assert_close(both, (2 * once + other) / 3, rtol=0, atol=1e-12)


def test_crossover_and_mutation_agree_with_the_slow_implementation() -> None:
    allowed = list(range(100, 150))
    parents = [tuple(range(start, start + 6)) for start in range(0, 60, 6)]
    for seed in range(20):
        draws = torch.rand((10, 3), generator=stream(1, "test", seed), dtype=torch.float64).tolist()
        children = crossover(parents, 0.5, stream(1, "test", seed))
        assert children == [tuple(child) for child in oracle.cross([list(row) for row in parents], 0.5, draws)]
        mutants = mutate(parents, 0.5, allowed, stream(1, "test", seed))
        assert mutants == [tuple(row) for row in oracle.change([list(row) for row in parents], 0.5, allowed, draws)]


def test_rates_of_0_and_1_mean_never_and_always() -> None:
    parents = [(1, 2, 3), (4, 5, 6)]
    assert crossover(parents, 0, stream(0, "test")) == []
    assert len(crossover(parents, 1, stream(0, "test"))) == 4
    assert mutate(parents, 0, [9], stream(0, "test")) == parents
    assert all(row.count(9) == 1 for row in mutate(parents, 1, [9], stream(0, "test")))
    assert mutate([], 1, [9], stream(0, "test")) == []


def test_every_cut_place_and_token_is_drawn() -> None:
    parents = [(0, 0, 0)] * 500 + [(1, 1, 1)] * 500
    assert set(crossover(parents, 1, stream(0, "test"))) == {
        (0, 0, 0), (1, 1, 1), (0, 1, 1), (1, 0, 0), (0, 0, 1), (1, 1, 0)
    }  # fmt: skip
    assert len(set(mutate([(0, 0, 0)] * 500, 1, [7, 8, 9], stream(0, "test")))) == 9


def test_the_fitness_of_survivors_is_remembered(tiny_model64: TextToImage) -> None:
    model, rows = tiny_model64, [(40, 41), (42, 43), (44, 45)]
    targets = model.encode(["a church", "a fish"])
    encoded = count_encoded(model)
    first = fitness(model, [rows[:2] * 2, rows[:1]], targets)
    assert sorted(encoded.values()) == [1, 2]  # twice only for two targets
    second = fitness(model, [rows[1:], rows[:1]], targets, first)
    assert sorted(encoded.values()) == [1, 1, 2]
    assert list(second[0]) == rows[1:]
    assert second[0][rows[1]] == first[0][rows[1]]
    assert second[1] == first[1]


def test_survivors_are_not_encoded_twice(tiny_model: TextToImage) -> None:
    encoded = count_encoded(tiny_model)
    targets = tiny_model.encode(["a church"])
    encoded.clear()
    RingABell(**SMALL, mutation_rate=0, crossover_rate=0).evolve(tiny_model, targets, [stream(0, "test")])
    assert len(encoded) == encoded.total() == 10
    encoded.clear()
    RingABell(**SMALL, mutated="children").evolve(tiny_model, targets, [stream(0, "test")])
    assert encoded.total() == len(encoded) > 10


def test_parents_that_do_not_mutate_never_lose_the_nearest(tiny_model: TextToImage) -> None:
    targets = tiny_model.encode(["a church"])
    for number in range(3):
        distances = []
        for generations in range(1, 15):
            attack = RingABell(**{**SMALL, "generations": generations}, mutated="children")
            distances.append(attack.evolve(tiny_model, targets, [stream(0, "test", number)])[0][1])
        assert distances == sorted(distances, reverse=True)
        assert distances[-1] < distances[0]


def test_outcomes_do_not_depend_on_batch_size_or_order(tiny_model64: TextToImage) -> None:
    together = run(tiny_model64, by_pixels, batch_size=8)
    alone = run(tiny_model64, by_pixels, CASES[::-1], batch_size=1)
    assert_same_outcomes(together, alone)
    assert {outcome.success for outcome in together.values()} == {True, False}


def test_a_searched_prompt_costs_its_two_pictures(tiny_model: TextToImage) -> None:
    outcomes = run(tiny_model, by_pixels)
    assert sum(outcome.unet_evaluations for outcome in outcomes.values()) == tiny_model.unet_evaluations
    for outcome in outcomes.values():
        assert len(outcome.checks) == (1 if outcome.plain_success else 2)
        assert outcome.unet_evaluations == 2 * SAMPLING.steps * len(outcome.checks)
        assert (outcome.adversarial_prompt == outcome.prompt) == outcome.plain_success


def test_the_adversarial_prompt_is_text_that_draws_the_judged_picture(tiny_model64: TextToImage) -> None:
    for case, outcome in zip(CASES, run(tiny_model64).values(), strict=True):
        again = tiny_model64.generate([outcome.adversarial_prompt], seeds=[case.seed], steps=2, guidance=case.guidance)
        assert torch.equal(again[0], outcome.image)


def test_what_the_text_loses_is_reported(tiny_model: TextToImage, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run(tiny_model)
    (line,) = (record.message for record in caplog.records if record.name == "attacks.ringabell")
    assert "of 5 texts encode to the tokens that were found" in line
    assert "as found" in line
    assert "as text" in line


def test_pairs_come_from_a_file_or_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    lines = ["without,note,with", *(f"{absent},x,{present}" for present, absent in PAIRS)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    assert read_pairs(path) == PAIRS
    for pairs in (str(path), [list(pair) for pair in PAIRS]):
        assert resolve_pairs(RingABell(pairs).pairs) == PAIRS


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"with,prompt\na,b\n", "lacks the columns without"),
        (b"with,without\n", "has no pairs"),
        (b"with,without\na,b\na, \n", "lacks a prompt in line 3"),
        (b"with,without\na\n", "lacks a prompt in line 2"),
        (b"\xff\xfe\x00", "not a CSV file in UTF-8"),
    ],
)
def test_broken_pairs_are_refused_when_the_attack_is_made(tmp_path: Path, content: bytes, fault: str) -> None:
    path = tmp_path / "pairs.csv"
    path.write_bytes(content)
    with pytest.raises(ValidationError, match=f"pairs.csv.*{fault}"):
        RingABell(path)
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere\.csv"):
        RingABell(tmp_path / "nowhere.csv")


@pytest.mark.parametrize(
    "field",
    [
        {"pairs": ()},
        {"pairs": None},
        {"pairs": (("a church",),)},
        {"pairs": ("ab",)},
        {"eta": 0},
        {"tokens": 0},
        {"population": 1},
        {"generations": 0},
        {"crossover_rate": 1.1},
        {"mutation_rate": -0.1},
        {"mutated": "parents"},
        {"k": 3},
    ],
)
def test_fields_out_of_range_are_refused(field: dict) -> None:
    with pytest.raises(ValidationError):
        RingABell(**{"pairs": PAIRS, **field})


def test_a_concept_without_pairs_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIG_FOLDER.parent)
    with pytest.raises(CommandError, match=r"^attack.pairs: pairs is None; it must be a CSV file .* of a concept"):
        make_job("attack=ringabell", "concept.pairs=null", "tracker=off")


def test_too_many_tokens_are_refused(tiny_model: TextToImage) -> None:
    with pytest.raises(ValueError, match="30 tokens cannot be inserted"):
        RingABell(PAIRS, tokens=30).run(tiny_model, [], never, sampling=SAMPLING)


@pytest.mark.parametrize("kind", ["style", "object", "unsafe"])
@pytest.mark.parametrize("family", ["canvas", "sd"])
def test_config_instantiates_and_names_every_field(family: str, kind: str, name: str = "ringabell") -> None:
    path = CONFIG_FOLDER.parent / "prompts/canvas/fire_pairs.csv"
    config = method_config("attack", name, concept={"kind": kind, "pairs": str(path)}, model={"family": family})
    attack = instantiate(config, _convert_="all")
    assert set(config) - {"_target_"} == {field.name for field in dataclasses.fields(attack)}
    assert attack.seed == 7
    assert attack.pairs == path


def test_the_pairs_content_is_part_of_the_attacks_hash_and_not_of_the_edits(
    tiny_model: TextToImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CONFIG_FOLDER.parent)
    attacks, edits = [], []
    for name, prompt in (("first", "a church"), ("copy", "a church"), ("other", "a chapel")):
        path = tmp_path / f"{name}.csv"
        path.write_text(f"with,without\n{prompt},a picture\n")
        job = make_job("attack=ringabell", "eraser=none", "tracker=off", f"concept.pairs={path}")
        stages = Stages(job, Store(tmp_path / "store"), tiny_model)
        attacks.append(stages.attack_key)
        edits.append(stages.edit().folder)
    assert attacks[0] == attacks[1] != attacks[2]
    assert edits[0] == edits[1] == edits[2]
