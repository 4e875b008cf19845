"""Text-free inversion against a slow second implementation, and controls in which it must find nothing."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from pydantic import ValidationError
from torch import Tensor

from attacks.cases import JudgedPicture, Outcome, PromptCase
from attacks.noise import NoiseAttack
from attacks.shell import energy_distance, most_distance
from attacks.tina import TextFreeInversion
from diffusion.canvas.drawing import draw
from diffusion.canvas.source import CanvasSource
from diffusion.canvas.world import Scene
from diffusion.model import TextToImage
from diffusion.sampling import Sampling
from diffusion.streams import stream
from erasure.concept import Concept
from erasure.erasers.output_zero import OutputZero
from erasure.erasers.random_weights import RandomWeights
from erasure.pruning.off import Off
from evaluation.judges.canvas import CanvasJudge
from tests.attack_cases import assert_same_outcomes, by_number, make_cases
from tests.judges import never, one_in
from tests.oracles import tina as oracle
from tests.tiny_job import method_config

PROMPTS = ["a church", "a photo of a red church in the snow", "two blue fish"]
SAMPLING = Sampling(steps=4, batch_size=3)
TIMESTEPS = [751, 501, 251, 1]
SOLVED = {"iterations": 40, "residual": 1e-18}


@pytest.fixture
def tame(tiny_model64: TextToImage) -> TextToImage:
    """Equations are solved where the prediction changes little with the latents; random weights are not so tame."""
    for parameter in tiny_model64.network.conv_out.parameters():
        parameter.data.mul_(0.01)
    return tiny_model64


def run(model: TextToImage, cases: Sequence[PromptCase], judge=never, **fields) -> dict[int, Outcome]:
    return by_number(list(TextFreeInversion(**fields).run(model, cases, judge, sampling=SAMPLING)))


@pytest.mark.parametrize("skipped_share", [0.0, 0.3])
def test_inversion_agrees_with_the_slow_implementation(
    tame: TextToImage, monkeypatch: pytest.MonkeyPatch, skipped_share: float
) -> None:
    cases = make_cases(tame, PROMPTS[:2])
    drawn: list[tuple[Tensor, Tensor]] = []
    sample = tame.sample

    def recorded(text: Tensor, *, noise: Tensor, **rest) -> Tensor:
        drawn.extend(zip(text, noise, strict=True))
        return sample(text, noise=noise, **rest)

    monkeypatch.setattr(tame, "sample", recorded)
    outcomes = run(tame, cases, **SOLVED, skipped_share=skipped_share, seed=3)
    skipped = int(skipped_share * 4)
    [empty] = tame.encode_prompts([""])
    for case, (text, noise) in zip(cases, drawn[len(cases) :], strict=True):
        picture = tame.encode_images(case.target[None])[0]
        start = picture
        if skipped:
            level = float(tame.process.alphas[TIMESTEPS[-skipped]])
            eps = torch.randn(picture.shape, generator=stream(3, "tina/forward_marginal", case.case_number))
            start = math.sqrt(level) * picture + math.sqrt(1 - level) * eps
        expected = oracle.invert(tame, start, TIMESTEPS, skipped)
        torch.testing.assert_close(noise, expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(text, empty)
        _, check = outcomes[case.case_number].checks
        abar = float(tame.process.alphas[TIMESTEPS[0]])
        assert check.measured["energy"] == pytest.approx(oracle.energy_distance(expected, picture, abar), rel=1e-6)
        assert 0 <= check.measured["residual"] < 1e-18


def test_what_is_not_solved_says_so(tiny_model64: TextToImage) -> None:
    (outcome,) = run(tiny_model64, make_cases(tiny_model64, PROMPTS[:1]), iterations=1, residual=1e-12).values()
    assert outcome.checks[1].measured["residual"] > 1e-6


def test_costs_are_exact_and_outcomes_depend_on_no_other_case(tame: TextToImage) -> None:
    cases = [*make_cases(tame, PROMPTS, 3.0)]
    before = tame.unet_evaluations
    together = run(tame, cases, one_in(3), batch_size=2)
    assert sum(outcome.unet_evaluations for outcome in together.values()) == tame.unet_evaluations - before
    assert any(len(outcome.checks) > 1 for outcome in together.values())
    alone = run(tame, cases[::-1], one_in(3), batch_size=1)
    assert_same_outcomes(together, alone)


def test_energy_is_measured_in_standard_deviations_of_noise() -> None:
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn((2000, 4, 8, 8), generator=generator, dtype=torch.float64)
    distances = energy_distance(noise)
    assert float(distances.mean()) == pytest.approx(0, abs=0.1)
    assert float(distances.std()) == pytest.approx(1, abs=0.05)
    pictures = 0.7 * torch.randn((2000, 4, 8, 8), generator=generator, dtype=torch.float64) + 0.4
    mixed = energy_distance(math.sqrt(0.3) * pictures + math.sqrt(0.7) * noise, pictures, 0.3)
    assert float(mixed.mean()) == pytest.approx(0, abs=0.1)
    assert float(mixed.std()) == pytest.approx(1, abs=0.05)


def test_the_tolerance_is_the_same_share_of_every_latents_energy() -> None:
    for shape in ((4, 8, 8), (4, 64, 64)):
        latents = torch.ones(1, *shape, dtype=torch.float64)
        for share, within in ((1.10, True), (1.12, False), (0.90, True), (0.88, False)):
            distance = abs(float(energy_distance(math.sqrt(share) * latents)))
            assert (distance <= most_distance(latents.numel())) is within
    assert most_distance(4 * 64 * 64) == pytest.approx(10, abs=0.1)


CONTROLS = pytest.mark.parametrize("control", [OutputZero(), RandomWeights()], ids=["output_zero", "random_weights"])


@CONTROLS
@torch.backends.mkldnn.flags(enabled=True)
def test_gated_inversions_find_nothing_in_models_that_know_nothing(control: OutputZero | RandomWeights) -> None:
    """The pictures are there in the latents all the same: without the gate output zero gives every one back."""
    model = CanvasSource(device="cpu").load()
    generator = np.random.default_rng(0)
    drawn = [draw(Scene("photo", "church", setting="city"), generator) for _ in range(6)]
    pictures = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()
    judge = CanvasJudge("subject", "church")
    shown = judge(pictures).present
    assert shown.all()
    plain = JudgedPicture(False, 0.0, torch.zeros_like(pictures[0]))
    cases = [PromptCase(number, "a church", number, 1.0, picture, plain) for number, picture in enumerate(pictures)]
    concept = Concept("church", "object", ("church",))
    edit = control.erase(model, concept, Off(), seed=0).edit
    sampling = Sampling(steps=5, batch_size=6)
    attacks = {
        "tina_plus": TextFreeInversion(skipped_share=0.1, tolerance=0.11, iterations=5),
        "noise_inversion": NoiseAttack(mode="inversion", inverted_with="guidance"),
        "without gate": NoiseAttack(mode="inversion", inverted_with="guidance", tolerance=None),
    }
    with edit.applied(model):
        found = {
            name: sum(outcome.success for outcome in attack.run(model, cases, judge, sampling=sampling))
            for name, attack in attacks.items()
        }
    assert found["tina_plus"] == found["noise_inversion"] == 0
    if isinstance(control, OutputZero):
        assert found["without gate"] >= 5


@pytest.mark.parametrize(
    "field", [{"skipped_share": 1}, {"tolerance": 0}, {"damping": 0}, {"iterations": 0}, {"residual": 0}, {"steps": 1}]
)
def test_fields_out_of_range_are_refused(field: dict) -> None:
    with pytest.raises(ValidationError):
        TextFreeInversion(**field)


@pytest.mark.parametrize(("name", "tolerance"), [("tina", None), ("tina_plus", 0.11)])
def test_configs_name_every_field(name: str, tolerance: float | None) -> None:
    config = method_config("attack", name)
    attack = instantiate(config, _convert_="all")
    assert set(config) - {"_target_"} == {field.name for field in dataclasses.fields(attack)}
    assert attack.tolerance == tolerance


def test_a_target_is_needed(tiny_model: TextToImage) -> None:
    case = dataclasses.replace(make_cases(tiny_model, PROMPTS)[0], target=None)
    with pytest.raises(ValueError, match="case 10 has no target picture; TextFreeInversion needs"):
        TextFreeInversion().run(tiny_model, [case], never, sampling=SAMPLING)
