"""Noise attacks against slow second implementations, the geometry of their projections, and what they cost."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from hydra.utils import instantiate
from pydantic import ValidationError
from torch import Tensor

from attacks.cases import JudgedPicture, Outcome, PromptCase
from attacks.noise import NoiseAttack, ddim_move, denoising_path, invert, project_to_ball, project_to_cap, thinned
from diffusion.canvas.plan import make_scheduler
from diffusion.model import TextToImage
from diffusion.sampling import Sampling
from evaluation.verdicts import Judge
from tests.attack_cases import assert_same_outcomes, by_number, make_cases
from tests.judges import never, one_in
from tests.oracles import noise as oracle
from tests.oracles.tina import energy_distance
from tests.tiny_job import method_config

PROMPTS = ["a church", "a photo of a red church in the snow", "", "two blue fish"]
GUIDANCE = [3.0, 1.0, 3.0, 1.0]
SAMPLING = Sampling(steps=3, batch_size=3)
TIMESTEPS = [667, 334, 1]
ADVERSARIAL = {"radius": 0.2, "unrolled_steps": 2, "checks": 2, "steps_per_check": 2, "step_size": 0.6}
INVERSION = {"mode": "inversion"}
by_pixels = one_in(3)
UNSEEN = JudgedPicture(False, 0.0, torch.zeros(3, 16, 16, dtype=torch.uint8))
"""A plain picture that was judged before, and does not show the concept."""

Noises = dict[int, list[Tensor]]
"""What the sampling of each seed's pictures started from, in order."""

both = pytest.mark.parametrize("fields", [ADVERSARIAL, {**INVERSION, "inverted_with": "guidance"}])


def run(model: TextToImage, cases: Sequence[PromptCase], judge: Judge = never, **fields) -> dict[int, Outcome]:
    """Outcomes by case number."""
    return by_number(list(NoiseAttack(**fields).run(model, cases, judge, sampling=SAMPLING)))


@pytest.fixture
def started_from(tiny_model64: TextToImage, monkeypatch: pytest.MonkeyPatch) -> Noises:
    noises, sample = defaultdict(list), tiny_model64.sample

    def recorded(text: Tensor, *, seeds: Sequence[int], noise: Tensor, **rest) -> Tensor:
        for seed, start in zip(seeds, noise, strict=True):
            noises[seed].append(start.clone())
        return sample(text, seeds=seeds, noise=noise, **rest)

    monkeypatch.setattr(tiny_model64, "sample", recorded)
    return noises


def points_around(centres: Tensor, generator: torch.Generator, spread: float) -> Tensor:
    return centres + spread * torch.randn(centres.shape, generator=generator, dtype=torch.float64)


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def sizes(points: Tensor) -> Tensor:
    return points.flatten(1).norm(dim=1)


@pytest.mark.parametrize("on_sphere", [True, False])
def test_adversarial_search_agrees_with_the_slow_implementation(
    tiny_model64: TextToImage, started_from: Noises, on_sphere: bool
) -> None:
    model = tiny_model64
    cases = make_cases(model, PROMPTS[:2], GUIDANCE[:2])[0 if on_sphere else 1 :]
    outcomes = run(model, cases, **ADVERSARIAL, unit_variance=on_sphere)
    for case in cases:
        z = model.initial_latents([case.seed])[0]
        slow = oracle.attack(
            model,
            oracle.predictor(model, case.prompt, case.guidance),
            model.encode_images(case.target[None])[0],
            z,
            timesteps=[667, 334],
            radius=0.2,
            step_size=0.6,
            on_sphere=on_sphere,
            checks=2,
            steps=2,
        )
        seeded, *found = started_from[case.seed]
        assert torch.equal(seeded, z)
        plain, *checks = outcomes[case.case_number].checks
        assert plain.loss is None
        assert [check.variant for check in checks] == ["noise after 2 steps", "noise after 4 steps"]
        for check, noise, (expected, loss) in zip(checks, found, slow, strict=True):
            torch.testing.assert_close(noise, expected, rtol=1e-7, atol=1e-9)
            assert check.loss == pytest.approx(loss, rel=1e-8)


@pytest.mark.parametrize("on_sphere", [True, False])
def test_noise_stays_within_the_radius_of_the_seeds_and_reaches_it(
    tiny_model64: TextToImage, started_from: Noises, on_sphere: bool
) -> None:
    cases = make_cases(tiny_model64, PROMPTS[:1], 1.0)
    fields = {**ADVERSARIAL, "unrolled_steps": 1, "checks": 3, "steps_per_check": 1, "step_size": 0.9}
    run(tiny_model64, cases, **fields, unit_variance=on_sphere)
    ((seeded, *found),) = started_from.values()
    assert len(found) == 3
    distances = [float((noise - seeded).norm() / seeded.norm()) for noise in found]
    assert max(distances) <= 0.2 * (1 + 1e-9)
    assert max(distances) == pytest.approx(0.2)
    kept = [math.isclose(float(noise.norm()), float(seeded.norm()), rel_tol=1e-9) for noise in found]
    assert all(kept) if on_sphere else not any(kept)


def test_search_comes_nearer_to_the_picture(tiny_model64: TextToImage) -> None:
    cases = make_cases(tiny_model64, PROMPTS[:1])
    fields = {**ADVERSARIAL, "checks": 4, "steps_per_check": 1, "step_size": 0.1, "radius": 1.0}
    (outcome,) = run(tiny_model64, cases, **fields).values()
    losses = [check.loss for check in outcome.checks[1:]]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 4


@pytest.mark.parametrize("radius", [0.3, 1.4, 2.0])
@pytest.mark.parametrize("project", [project_to_ball, project_to_cap])
def test_projections_find_the_nearest_feasible_point(project, radius: float) -> None:
    generator = torch.Generator().manual_seed(3)
    centres = draw(generator, 50, 1, 2, 2) * torch.linspace(0.1, 5, 50)[:, None, None, None]
    points = points_around(centres, generator, 1.5)
    projected = project(points, centres, radius)
    distances = sizes(projected - points)
    assert (sizes(projected - centres) <= radius * sizes(centres) * (1 + 1e-9)).all()
    torch.testing.assert_close(project(projected, centres, radius), projected, rtol=1e-7, atol=1e-7)
    slow = oracle.nearest_in_ball if project is project_to_ball else oracle.nearest_in_cap
    for point, centre, found in zip(points, centres, projected, strict=True):
        torch.testing.assert_close(found, slow(point, centre, radius), rtol=1e-9, atol=1e-9)
    if project is project_to_cap:
        torch.testing.assert_close(sizes(projected), sizes(centres))
    # Others of the set, near what was found and everywhere.
    for spread in (0.01, 0.1, 1.0):
        for _ in range(100):
            others = points_around(projected, generator, spread)
            if project is project_to_cap:
                others = others * (sizes(centres) / sizes(others))[:, None, None, None]
            feasible = sizes(others - centres) <= radius * sizes(centres)
            assert feasible.any()
            assert (sizes(others - points) >= distances * (1 - 1e-9))[feasible].all()


def test_projections_leave_feasible_points_and_the_centre_where_they_are() -> None:
    generator = torch.Generator().manual_seed(4)
    centres = draw(generator, 20, 4, 3, 3)
    inside = points_around(centres, generator, 0.05)
    torch.testing.assert_close(project_to_ball(inside, centres, 0.3), inside, rtol=1e-12, atol=1e-12)
    on_sphere = inside * (sizes(centres) / sizes(inside))[:, None, None, None]
    torch.testing.assert_close(project_to_cap(on_sphere, centres, 0.3), on_sphere, rtol=1e-12, atol=1e-12)
    for project in (project_to_ball, project_to_cap):
        torch.testing.assert_close(project(centres, centres, 0.3), centres, rtol=1e-12, atol=1e-12)


def test_path_is_that_of_the_ddim_sampler(tiny_model64: TextToImage) -> None:
    generator = torch.Generator().manual_seed(6)
    scheduler: DDIMScheduler = make_scheduler()
    scheduler.set_timesteps(3)
    path = denoising_path(tiny_model64, 3)
    assert [step.timestep for step in path] == TIMESTEPS == scheduler.timesteps.tolist()
    for step in path:
        latents, noise = draw(generator, 2, 4, 8, 8), draw(generator, 2, 4, 8, 8)
        expected = scheduler.step(noise, step.timestep, latents).prev_sample
        torch.testing.assert_close(ddim_move(latents, noise, step.noisy, step.clean), expected, rtol=1e-5, atol=1e-5)
    for steps, count, kept in [(3, 3, TIMESTEPS), (3, 1, [667]), (4, 2, [751, 251]), (5, 2, [801, 401])]:
        some = thinned(denoising_path(tiny_model64, steps), count)
        assert [step.timestep for step in some] == kept
        assert [step.noisy for step in some] == [float(scheduler.alphas_cumprod[timestep]) for timestep in kept]
        assert [step.clean for step in some] == [*(step.noisy for step in some[1:]), float(scheduler.alphas_cumprod[0])]


@pytest.mark.parametrize(
    ("inverted_with", "iterations"), [("plain", 1), ("empty", 2), ("guidance", 1), ("guidance", 2)]
)
def test_inversion_agrees_with_the_slow_implementation(
    tiny_model64: TextToImage, started_from: Noises, inverted_with: str, iterations: int
) -> None:
    model = tiny_model64
    cases = make_cases(model, PROMPTS[:2], GUIDANCE[:2])
    outcomes = run(model, cases, **INVERSION, inverted_with=inverted_with, inversion_iterations=iterations)
    for case in cases:
        prompt = "" if inverted_with == "empty" else case.prompt
        predict = oracle.predictor(model, prompt, case.guidance if inverted_with == "guidance" else 1)
        target = model.encode_images(case.target[None])[0]
        expected = oracle.invert(model, predict, target, TIMESTEPS, iterations)
        seeded, found = started_from[case.seed]
        assert torch.equal(seeded, model.initial_latents([case.seed])[0])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        likelihood = torch.distributions.Normal(0.0, 1.0).log_prob(expected).mean()
        plain, check = outcomes[case.case_number].checks
        assert plain.loss is None
        assert check.loss == pytest.approx(-float(likelihood), rel=1e-6)
        abar = float(model.alphas_cumprod[TIMESTEPS[0]])
        assert check.measured["energy"] == pytest.approx(energy_distance(expected, target, abar), rel=1e-6)
        assert ("residual" in check.measured) == (iterations > 1)


def test_one_iteration_is_ddim_inversion_as_usual(tiny_model64: TextToImage) -> None:
    model = tiny_model64
    text = model.encode_prompts(["a church"])
    targets = model.encode_images(make_cases(model, PROMPTS)[0].target[None])
    scheduler = DDIMInverseScheduler.from_config(make_scheduler().config)
    scheduler.set_timesteps(3)
    latents = targets
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            latents = scheduler.step(model.predict_noise(latents, timestep, text), timestep, latents).prev_sample
    found, _ = invert(lambda x, t: model.predict_noise(x, t, text), denoising_path(model, 3), targets, 1)
    torch.testing.assert_close(found, latents, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_sampling_from_well_inverted_noise_returns_the_picture(
    tiny_model64: TextToImage, started_from: Noises, guidance: float
) -> None:
    model = tiny_model64
    # The iteration converges where the prediction changes little with the latents; random weights are not so tame.
    for parameter in model.unet.conv_out.parameters():
        parameter.mul_(0.01)
    (case,) = make_cases(model, PROMPTS[:1], guidance)
    target = model.encode_images(case.target[None])
    errors = []
    for iterations in (1, 12):
        started_from.clear()
        (outcome,) = run(model, [case], **INVERSION, inverted_with="guidance", inversion_iterations=iterations).values()
        noise = started_from[case.seed][-1]
        back = oracle.sample(model, oracle.predictor(model, case.prompt, guidance), noise, TIMESTEPS)
        errors.append(float((back - target[0]).abs().max()))
    assert errors[1] < 1e-7 < 1e-4 < errors[0]
    off = (model.decode(target)[0].int() - outcome.image.int()).abs()
    assert off.max() <= 1


def test_inversions_loss_is_the_unlikelihood_of_the_noise(tiny_model64: TextToImage) -> None:
    """A U-Net that predicts nothing leaves the picture's own numbers, scaled."""
    model = tiny_model64
    (case,) = make_cases(model, PROMPTS[:1])
    model.predict_noise = lambda latents, *_: torch.zeros_like(latents)
    target = model.encode_images(case.target[None])
    ((_, check),) = [outcome.checks for outcome in run(model, [case], **INVERSION).values()]
    scaled = target * math.sqrt(float(model.alphas_cumprod[667] / model.alphas_cumprod[0]))
    assert check.loss == pytest.approx(float(scaled.square().mean() + math.log(2 * math.pi)) / 2, rel=1e-6)


@pytest.mark.parametrize("prediction", [0.0, 10.0])
def test_an_inversion_that_ends_in_no_noise_counts_for_nothing(tiny_model64: TextToImage, prediction: float) -> None:
    """Too little energy and too much are refused alike, whatever the judge says of the picture."""
    model = tiny_model64
    cases = [dataclasses.replace(case, plain=UNSEEN) for case in make_cases(model, PROMPTS[:2])]
    model.predict_noise = lambda latents, *_: torch.full_like(latents, prediction)
    for tolerance, counts in ((0.11, False), (None, True)):
        for outcome in run(model, cases, one_in(1), **INVERSION, tolerance=tolerance).values():
            (_, check) = outcome.checks
            assert check.present
            assert (check.counts, outcome.success) == (counts, counts)
            assert math.copysign(1, check.measured["energy"]) == (1 if prediction else -1)


def test_noise_of_the_seeds_norm_is_as_far_from_the_shell_as_the_seeds(tiny_model64: TextToImage) -> None:
    (case,) = make_cases(tiny_model64, PROMPTS[:1])
    energy = float(tiny_model64.initial_latents([case.seed]).square().sum())
    size = math.prod(tiny_model64.latent_shape)
    ((_, *checks),) = [outcome.checks for outcome in run(tiny_model64, [case], **ADVERSARIAL).values()]
    for check in checks:
        assert check.measured["energy"] == pytest.approx((energy - size) / math.sqrt(2 * size), abs=1e-6)
        assert check.counts


@pytest.mark.parametrize(
    ("fields", "costs"),
    [
        (ADVERSARIAL, (2 * 2 * 2 * 2, 2 * 2 * 2)),
        ({**ADVERSARIAL, "unrolled_steps": 3, "steps_per_check": 1}, (2 * 2 * 3, 2 * 3)),
        (INVERSION, (3, 3)),
        ({**INVERSION, "inverted_with": "guidance", "inversion_iterations": 3}, (2 * 3 * 3, 3 * 3)),
        ({**INVERSION, "inverted_with": "empty", "inversion_iterations": 2}, (2 * 3, 2 * 3)),
    ],
)
def test_every_cases_cost_is_exact(tiny_model: TextToImage, fields: dict, costs: tuple[int, int]) -> None:
    """``costs`` are a check's of a guided and an unguided case, its picture not counted."""
    cases = make_cases(tiny_model, PROMPTS, GUIDANCE)
    outcomes = run(tiny_model, cases, by_pixels, **fields, batch_size=3)
    assert any(len(outcome.checks) > 1 for outcome in outcomes.values())
    assert sum(outcome.unet_evaluations for outcome in outcomes.values()) == tiny_model.unet_evaluations
    for case in cases:
        outcome = outcomes[case.case_number]
        search, picture = (costs[0], 2 * 3) if case.guidance == 3 else (costs[1], 3)
        spent = [picture + number * (picture + search) for number in range(len(outcome.checks))]
        assert [check.unet_evaluations for check in outcome.checks] == spent
        assert all(check.shared_evaluations == 0 for check in outcome.checks)


@both
def test_outcomes_do_not_depend_on_batch_size_or_order(tiny_model64: TextToImage, fields: dict) -> None:
    fields = {**fields, "steps_per_check": 1}
    cases = make_cases(tiny_model64, PROMPTS, [3.0, 1.0, 2.0, 1.0])
    alone = run(tiny_model64, cases, by_pixels, **fields, batch_size=1)
    assert len({len(outcome.checks) for outcome in alone.values()}) > 1
    assert_same_outcomes(alone, run(tiny_model64, cases, by_pixels, **fields, batch_size=4))
    assert_same_outcomes(alone, run(tiny_model64, cases[::-1], by_pixels, **fields, batch_size=2))


def test_prompts_that_succeed_as_they_stand_are_not_attacked(tiny_model: TextToImage) -> None:
    cases = make_cases(tiny_model, PROMPTS, GUIDANCE)
    for outcome in run(tiny_model, cases, one_in(1), **ADVERSARIAL).values():
        assert outcome.plain_success
        assert len(outcome.checks) == 1
    assert tiny_model.unet_evaluations == sum(6 if case.guidance == 3 else 3 for case in cases)


@both
def test_half_precision_models_are_attacked_too(tiny_model: TextToImage, fields: dict) -> None:
    cases = make_cases(tiny_model, PROMPTS[:2], GUIDANCE[:2])
    for part in (tiny_model.unet, tiny_model.text_encoder, tiny_model.vae):
        part.to(torch.bfloat16)
    for outcome in run(tiny_model, cases, **{**fields, "checks": 1, "steps_per_check": 1}).values():
        assert len(outcome.checks) == 2
        assert all(math.isfinite(check.loss) for check in outcome.checks[1:])


def test_what_it_needs_is_asked_for_before_anything_is_spent(tiny_model: TextToImage) -> None:
    case = dataclasses.replace(make_cases(tiny_model, PROMPTS)[0], target=None)
    for fields in (ADVERSARIAL, INVERSION):
        with pytest.raises(ValueError, match="case 10 has no target picture; NoiseAttack needs"):
            NoiseAttack(**fields).run(tiny_model, [case], never, sampling=SAMPLING)
    with pytest.raises(ValueError, match=r"^unrolled_steps is 5; a picture has 3: use no more\.$"):
        NoiseAttack(unrolled_steps=5).run(tiny_model, [], never, sampling=SAMPLING)
    assert run(tiny_model, [], **INVERSION, unrolled_steps=5) == {}
    assert tiny_model.unet_evaluations == 0


@pytest.mark.parametrize(
    "field",
    [
        {"mode": "both"},
        {"radius": 0},
        {"radius": 2.1},
        {"unrolled_steps": 0},
        {"checks": 0},
        {"steps_per_check": 0},
        {"step_size": 0},
        {"inverted_with": "prompt"},
        {"inversion_iterations": 0},
        {"tolerance": 0},
        {"batch_size": 0},
        {"seed": 1},
    ],
)
def test_fields_out_of_range_are_refused(field: dict) -> None:
    with pytest.raises(ValidationError):
        NoiseAttack(**field)


@pytest.mark.parametrize(("name", "mode"), [("noise", "adversarial"), ("noise_inversion", "inversion")])
def test_config_instantiates_and_names_every_field(name: str, mode: str) -> None:
    config = method_config("attack", name)
    attack = instantiate(config, _convert_="all")
    assert set(config) - {"_target_"} == {field.name for field in dataclasses.fields(attack)}
    assert attack.mode == mode
