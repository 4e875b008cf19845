"""What networks predict, where schedules end, and what half precision makes of both."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from diffusion.model import SCHEDULER_OPTIONS, SCHEDULERS, TextToImage
from tests.conftest import make_tiny_pipeline

PROMPTS = ["a church", "two gas pumps on fire", "pixel art of a tench"]
SEEDS = [11, 5, 12]
PURE_NOISE = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def pipeline_with(tokenizer_folder: Path, **scheduler: object) -> StableDiffusionPipeline:
    pipeline = make_tiny_pipeline(tokenizer_folder)
    config = {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")}
    pipeline.scheduler = DDIMScheduler(**config | scheduler)
    return pipeline


def latents_of_diffusers(pipeline: StableDiffusionPipeline, scheduler: str, guidance: float, noise: Tensor) -> Tensor:
    config = {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")}
    pipeline.scheduler = SCHEDULERS[scheduler].from_config(config, **SCHEDULER_OPTIONS.get(scheduler, {}))
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 5, "guidance_scale": guidance, "output_type": "latent"}
    return pipeline(list(PROMPTS), latents=noise, **options).images


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("scheduler", ["ddim", "dpmsolver++", "euler"])
def test_velocity_down_to_pure_noise_is_sampled_as_by_diffusers(
    tokenizer_folder: Path, scheduler: str, guidance: float
) -> None:
    pipeline = pipeline_with(tokenizer_folder, prediction_type="v_prediction", **PURE_NOISE)
    model = TextToImage(pipeline, scheduler=scheduler)
    assert int(model.sampling_timesteps(5)[0]) == 999
    ours = model.sample(model.encode(PROMPTS), seeds=SEEDS, steps=5, guidance=guidance)
    theirs = latents_of_diffusers(pipeline, scheduler, guidance, model.initial_latents(SEEDS))
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("predicts", ["v_prediction", "sample"])
def test_every_sampler_follows_a_schedule_down_to_pure_noise(
    tokenizer_folder: Path, scheduler: str, predicts: str
) -> None:
    model = TextToImage(pipeline_with(tokenizer_folder, prediction_type=predicts, **PURE_NOISE), scheduler=scheduler)
    alphas = model.make_scheduler(5).alphas_cumprod
    torch.testing.assert_close(alphas, model.alphas_cumprod, atol=2e-8, rtol=1e-5)
    latents = model.sample(model.encode(PROMPTS), seeds=SEEDS, steps=5, guidance=3.0)
    assert latents.abs().max() < 100


@pytest.mark.parametrize("scheduler", ["ddim", "dpmsolver++", "euler", "lms"])
def test_predicted_pictures_are_sampled_as_by_diffusers(tokenizer_folder: Path, scheduler: str) -> None:
    pipeline = pipeline_with(tokenizer_folder, prediction_type="sample")
    model = TextToImage(pipeline, scheduler=scheduler)
    ours = model.sample(model.encode(PROMPTS), seeds=SEEDS, steps=5, guidance=5.0)
    as_noise = TextToImage(pipeline_with(tokenizer_folder), scheduler=scheduler)
    assert not torch.allclose(
        ours, as_noise.sample(as_noise.encode(PROMPTS), seeds=SEEDS, steps=5, guidance=5.0), atol=0.1
    )
    theirs = latents_of_diffusers(pipeline, scheduler, 5.0, model.initial_latents(SEEDS))
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=1e-3)


def test_a_predicted_picture_is_the_noise_that_it_leaves(tokenizer_folder: Path, tiny_model64: TextToImage) -> None:
    """x_t = sqrt(a) x_0 + sqrt(1 - a) e gives e = (x_t - sqrt(a) x_0) / sqrt(1 - a)."""
    pipeline = pipeline_with(tokenizer_folder, prediction_type="sample").to(torch.float64)
    model = TextToImage(pipeline)
    latents, text = model.initial_latents(SEEDS), model.encode(PROMPTS)
    timesteps = torch.tensor([1, 500, 999])
    picture = tiny_model64.predict_noise(latents, timesteps, text)
    noise = model.predict_noise(latents, timesteps, text)
    torch.testing.assert_close(model.add_noise(picture, noise, timesteps), latents)


@pytest.mark.parametrize(
    ("scheduler", "sentence"),
    [
        ({"prediction_type": "flow_prediction"}, "'flow_prediction'; it must be one of epsilon, v_prediction, sample"),
        (PURE_NOISE, "ends in pure noise"),
    ],
)
def test_what_cannot_be_sampled_is_refused_by_name(
    tokenizer_folder: Path, scheduler: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        TextToImage(pipeline_with(tokenizer_folder, **scheduler))


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0, 3.0])
def test_guidance_is_that_of_diffusers(tokenizer_folder: Path, guidance: float) -> None:
    pipeline = pipeline_with(tokenizer_folder)
    model = TextToImage(pipeline)
    text = model.encode(PROMPTS)
    ours = model.sample(text, seeds=SEEDS, steps=5, guidance=guidance)
    assert model.unet_evaluations == 5 * len(PROMPTS) * model.evaluations_per_step(guidance)
    mixed = model.sample(text, seeds=SEEDS, steps=5, guidance=[guidance, 3.0, guidance])
    torch.testing.assert_close(mixed[::2], ours[::2], atol=1e-4, rtol=0)
    theirs = latents_of_diffusers(pipeline, "ddim", guidance, model.initial_latents(SEEDS))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("predicts", ["v_prediction", "sample"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_keeps_the_schedule_exact(
    tokenizer_folder: Path, predicts: str, half: torch.dtype, autocast: bool
) -> None:
    """At t = 1 the factor sqrt(1 - abar) of bfloat16 would be 1.3 % off; only the network's output is rounded."""
    pipeline = pipeline_with(tokenizer_folder, prediction_type=predicts)
    model = TextToImage(pipeline if autocast else pipeline.to(half), autocast=half if autocast else None)
    latents, text = model.initial_latents(SEEDS), model.encode(PROMPTS)
    # Nothing of the network's own.
    model.unet.conv_out.weight.zero_()
    model.unet.conv_out.bias.zero_()
    abar = float(model.alphas_cumprod[1])
    expected = latents.double() * ((1 - abar) ** 0.5 if predicts == "v_prediction" else (1 - abar) ** -0.5)
    noise = model.predict_noise(latents, 1, text)
    assert noise.dtype == torch.float32
    torch.testing.assert_close(noise.double(), expected, atol=0, rtol=2e-4)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_noise_is_added_in_half_precision_as_exactly_as_it_can_be_written(
    tokenizer_folder: Path, half: torch.dtype
) -> None:
    model = TextToImage(pipeline_with(tokenizer_folder).to(half))
    noise = model.initial_latents(SEEDS)
    timesteps = torch.tensor([1, 20, 900])
    added = model.add_noise(torch.zeros_like(noise), noise, timesteps)
    roots = (1 - model.alphas_cumprod[timesteps].double()).sqrt().reshape(-1, 1, 1, 1)
    assert added.dtype == half
    torch.testing.assert_close(added.double(), roots * noise.double(), atol=1e-6, rtol=torch.finfo(half).eps)


def test_guidance_scales_are_not_rounded_to_half_precision(tokenizer_folder: Path) -> None:
    model = TextToImage(pipeline_with(tokenizer_folder).to(torch.bfloat16))
    latents, text, empty = model.initial_latents(SEEDS), model.encode(PROMPTS), model.encode([""])
    both = torch.cat([empty.expand_as(text), text])
    without, conditional = model.predict_noise(latents.repeat(2, 1, 1, 1), 500, both).double().chunk(2)
    guided = model.guided_noise(latents, 500, text, empty, 7.3)
    torch.testing.assert_close(guided.double(), without + 7.3 * (conditional - without), atol=0.05, rtol=0)
