"""Mask revival against a slow second implementation, the weights it draws with, and those it leaves behind."""

import dataclasses
import logging
from collections.abc import Sequence

import pytest
import torch
from hydra.utils import instantiate
from pydantic import ValidationError

from attacks.cases import Outcome, PromptCase
from attacks.mask_revival import MaskRevival, fill_zeros, soft_impute
from attacks.none import NoAttack
from diffusion.model import TextToImage
from diffusion.parameters import named_parameters
from diffusion.sampling import Sampling
from evaluation.verdicts import Verdicts
from tests.judges import never, one_in
from tests.oracles import mask_revival as oracle
from tests.tiny_job import method_config

SAMPLING = Sampling(steps=2, batch_size=3)
PROMPTS = ["a church", "a red fish", "", "a golf ball in the snow", "two blue fish"]
CASES = [PromptCase(10 + number, prompt, 50 + number, 3.0) for number, prompt in enumerate(PROMPTS)]
SEVERAL = {"top_ratios": (0.3, 0.6, 1.0), "parameters": "*.attn2.to_v.*", "iterations": 3}
by_pixels = one_in(4)


def prune(model: TextToImage, fraction: float = 0.2) -> TextToImage:
    """The model with random zeros in its values of cross-attention and in a kernel."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.network.named_parameters():
            if weight.ndim >= 2 and (".attn2.to_v." in name or name == "conv_in.weight"):
                weight.masked_fill_(torch.rand(weight.shape, generator=generator) < fraction, 0)
    return model


@pytest.fixture
def pruned_model(tiny_model64: TextToImage) -> TextToImage:
    return prune(tiny_model64)


def run(model: TextToImage, judge=never, cases: Sequence[PromptCase] = CASES, **fields) -> dict[int, Outcome]:
    """Outcomes by case number."""
    outcomes = MaskRevival(**{**SEVERAL, **fields}).run(model, cases, judge, sampling=SAMPLING)
    return {outcome.case_number: outcome for outcome in outcomes}


def pruned_matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    """A float64 matrix with zeros, one empty row and one empty column."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn((rows, columns), generator=generator, dtype=torch.float64) + 0.3
    matrix[torch.rand((rows, columns), generator=generator) < 0.2] = 0
    matrix[1], matrix[:, 2] = 0, 0
    return matrix


@pytest.mark.parametrize("shape", [(12, 7), (6, 9), (8, 8)])
@pytest.mark.parametrize("lag", [1, 2])
def test_completion_agrees_with_the_slow_implementation(
    shape: tuple[int, int], lag: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decompositions, svd = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: (decompositions.append(1), svd(*a, **k))[1])
    for limit in (100, 2):
        matrix = pruned_matrix(*shape, seed=0)
        completed = soft_impute(matrix, tolerance=1e-3, iterations=limit, lag=lag)
        expected, count = oracle.complete(matrix.tolist(), 1e-3, limit, lag)
        torch.testing.assert_close(completed, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)
        assert len(decompositions) == count
        assert torch.equal(completed[matrix != 0], matrix[matrix != 0])
        assert not completed[1].any()
        assert not completed[:, 2].any()
        decompositions.clear()


@pytest.mark.parametrize("magnitude", ["max", "mean", "completed"])
@pytest.mark.parametrize("top_ratio", ["0.1", "0.6", "0.7", "1"])
def test_filling_agrees_with_the_slow_implementation(magnitude: str, top_ratio: str) -> None:
    for seed in range(5):
        matrix = pruned_matrix(10, 10, seed)
        completed = soft_impute(matrix, tolerance=1e-3, iterations=20)
        filled = fill_zeros(matrix, completed, float(top_ratio), magnitude)
        expected = oracle.fill(matrix.tolist(), completed.tolist(), top_ratio, magnitude)
        torch.testing.assert_close(filled, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)
        assert not filled[1].any()
        assert not filled[:, 2].any()


def test_every_check_is_drawn_with_its_zeros_filled(pruned_model: TextToImage) -> None:
    model, seen = pruned_model, []

    def judge(images: torch.Tensor) -> Verdicts:
        seen.append(images[0])
        return never(images)

    (outcome,) = run(model, judge, CASES[:1], top_ratios=(0.6, 1.0), parameters="*", magnitude="mean").values()
    assert [check.variant for check in outcome.checks] == ["", "top 0.6", "top 1"]
    assert {check.prompt for check in outcome.checks} == {"a church"}
    for picture, top_ratio in zip(seen[1:], ("0.6", "1"), strict=True):
        with torch.no_grad():
            for name, weight in model.network.named_parameters():
                if weight.ndim >= 2 and (".attn2.to_v." in name or name == "conv_in.weight"):
                    matrix = weight.flatten(1).tolist()
                    completed = soft_impute(weight.flatten(1), tolerance=1e-5, iterations=3)
                    filled = oracle.fill(matrix, completed.tolist(), top_ratio, "mean")
                    weight.copy_(torch.tensor(filled).reshape(weight.shape))
        (expected,) = model.generate(["a church"], seeds=[50], steps=2, guidance=3.0)
        assert torch.equal(picture, expected)
        prune(model)
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_the_edited_weights_are_there_bit_for_bit_whenever_the_attack_hands_over(pruned_model: TextToImage) -> None:
    model = pruned_model
    parameters, before = named_parameters(model), model.fingerprint()

    def untouched() -> bool:
        now = named_parameters(model)
        return model.fingerprint() == before and all(now[name] is value for name, value in parameters.items())

    def judge(images: torch.Tensor) -> Verdicts:
        assert untouched()
        return by_pixels(images)

    attack = MaskRevival(**SEVERAL, batch_size=2)
    for _ in attack.run(model, CASES, judge, sampling=SAMPLING):
        assert untouched()
    abandoned = attack.run(model, CASES, never, sampling=SAMPLING)
    next(abandoned)
    assert untouched()
    abandoned.close()
    assert untouched()
    model.decode = lambda *_, **__: 1 / 0
    with pytest.raises(ZeroDivisionError):
        list(attack.run(model, CASES, never, sampling=SAMPLING))
    assert untouched()


def test_a_model_without_zeros_is_drawn_as_it_is(tiny_model64: TextToImage, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        outcomes = run(tiny_model64, by_pixels, parameters="*")
    plain = NoAttack().run(tiny_model64, CASES, by_pixels, sampling=SAMPLING)
    assert list(outcomes.values()) == list(plain)
    assert [record.message for record in caplog.records] == [
        "mask revival: no matrix of tiny has zeros enough, so there is nothing to revive"
    ]


def test_stray_zeros_and_what_is_gone_altogether_are_left_alone(tiny_model64: TextToImage) -> None:
    kernel, matrix, bias = (tiny_model64.network.get_parameter(name) for name in (
        "mid_block.resnets.0.conv1.weight", "conv_in.weight", "conv_in.bias"
    ))  # fmt: skip
    with torch.no_grad():
        kernel[0, 0, 0, 0], bias[:] = 0, 0
        matrix.zero_()
    assert MaskRevival().find_pruned(tiny_model64) == {}
    assert set(MaskRevival(least_pruned=1e-9).find_pruned(tiny_model64)) == {"mid_block.resnets.0.conv1.weight"}


def test_filled_weights_have_the_models_precision_and_keep_what_was_left(tiny_model: TextToImage) -> None:
    model = prune(tiny_model)
    model.network.to(torch.bfloat16)
    attack = MaskRevival(top_ratios=(1.0,), iterations=3)
    pruned = attack.find_pruned(model)
    for name, filled in attack.revive(pruned)["top 1"].items():
        kept = pruned[name] != 0
        assert filled.dtype == torch.bfloat16
        assert torch.equal(filled[kept], pruned[name][kept])
        assert (filled != 0).all()


def test_it_says_how_much_was_filled(pruned_model: TextToImage, caplog: pytest.LogCaptureFixture) -> None:
    pruned = MaskRevival(**SEVERAL).find_pruned(pruned_model)
    zeros = sum(int((weight == 0).sum()) for weight in pruned.values())
    with caplog.at_level(logging.INFO):
        run(pruned_model)
    lines = [record.message for record in caplog.records]
    assert len(lines) == 3, "the completion is made once"
    assert lines[2] == f"mask revival, top 1: {zeros} of {zeros} zeros in {len(pruned)} matrices filled"


def test_every_cases_cost_is_exact_and_filling_costs_no_evaluation(pruned_model: TextToImage) -> None:
    outcomes = run(pruned_model, by_pixels, batch_size=3)
    assert len({len(outcome.checks) for outcome in outcomes.values()}) > 1
    assert sum(outcome.unet_evaluations for outcome in outcomes.values()) == pruned_model.unet_evaluations
    for outcome in outcomes.values():
        assert outcome.unet_evaluations == len(outcome.checks) * 2 * SAMPLING.steps


def test_outcomes_do_not_depend_on_batch_size_or_order(pruned_model: TextToImage) -> None:
    alone = run(pruned_model, by_pixels, batch_size=1)
    for other in (
        run(pruned_model, by_pixels, batch_size=5),
        run(pruned_model, by_pixels, CASES[::-1], batch_size=2),
    ):
        assert other == alone
        assert all(torch.equal(other[number].image, outcome.image) for number, outcome in alone.items())


def test_a_pattern_that_no_parameter_matches_is_refused(tiny_model: TextToImage) -> None:
    with pytest.raises(ValueError, match=r"parameters is '\*.attn3.\*'; no parameter of the U-Net of 'tiny'"):
        MaskRevival(parameters="*.attn3.*").run(tiny_model, [], never, sampling=SAMPLING)


@pytest.mark.parametrize(
    "field",
    [
        {"top_ratios": ()},
        {"top_ratios": (0.0,)},
        {"top_ratios": (1.1,)},
        {"magnitude": "median"},
        {"tolerance": 0},
        {"iterations": 0},
        {"lag": 0},
        {"least_pruned": 0},
    ],
)
def test_fields_out_of_range_are_refused(field: dict) -> None:
    with pytest.raises(ValidationError):
        MaskRevival(**field)


@pytest.mark.parametrize("family", ["canvas", "sd"])
def test_config_instantiates_and_names_every_field(family: str, name: str = "mask_revival") -> None:
    config = method_config("attack", name, model={"family": family})
    attack = instantiate(config, _convert_="all")
    assert set(config) - {"_target_"} == {field.name for field in dataclasses.fields(attack)}
