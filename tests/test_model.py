from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, LMSDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffusion.guard import Encode, Guard, Guidance
from diffusion.model import TextToImage
from diffusion.processes.variance import SCHEDULER_OPTIONS, SCHEDULERS
from tests.conftest import make_tiny_pipeline
from tests.night import nightly

PROMPTS = ["a church", "two gas pumps on fire", "pixel art of a tench"]
SEEDS = [11, 5, 11]


@pytest.fixture
def pipeline(tokenizer_folder: Path) -> StableDiffusionPipeline:
    return make_tiny_pipeline(tokenizer_folder)


def latents_of(model: TextToImage, *, seed: int = 0, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((count, *model.latent_shape), generator=generator).to(model.dtype)


def unet_batches(model: TextToImage) -> list[int]:
    """A list that grows by the batch size of every call of the U-Net."""
    batches: list[int] = []
    model.network.register_forward_hook(lambda _module, inputs, _output: batches.append(len(inputs[0])))
    return batches


def test_a_picture_is_the_same_alone_and_in_a_batch_of_64(tiny_model: TextToImage):
    prompts = [f"{PROMPTS[number % 3]} number {number}" for number in range(64)]
    options = {"steps": 3, "guidance": 7.5}
    together = tiny_model.sample(tiny_model.encode(prompts), seeds=range(64), **options)
    for number in (0, 1, 37, 63):
        alone = tiny_model.sample(tiny_model.encode([prompts[number]]), seeds=[number], **options)
        torch.testing.assert_close(alone[0], together[number], atol=1e-3, rtol=0)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_batch_size_changes_no_picture(pipeline: StableDiffusionPipeline, scheduler: str):
    model = TextToImage(pipeline, scheduler=scheduler)
    options = {"seeds": SEEDS, "steps": 4, "guidance": [1.0, 7.5, 3.0]}
    text = model.encode(PROMPTS)
    whole = model.sample(text, **options)
    assert not torch.allclose(whole[0], whole[2], atol=1e-2)
    torch.testing.assert_close(model.sample(text, batch_size=2, **options), whole, atol=1e-3, rtol=0)


def test_guidance_evaluates_both_halves_in_one_batch(tiny_model: TextToImage):
    batches = unet_batches(tiny_model)
    text = tiny_model.encode(PROMPTS)
    tiny_model.sample(text, seeds=SEEDS, steps=4, guidance=7.5)
    assert batches == [6] * 4
    batches.clear()
    tiny_model.sample(text, seeds=SEEDS, steps=4, guidance=1.0)
    assert batches == [3] * 4


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("until", [None, 2])
def test_unet_evaluations_are_counted_exactly(pipeline: StableDiffusionPipeline, scheduler: str, until: int | None):
    model = TextToImage(pipeline, scheduler=scheduler)
    batches = unet_batches(model)
    model.sample(model.encode(PROMPTS), seeds=SEEDS, steps=5, guidance=7.5, until=until)
    calls = len(model.sampling_timesteps(5)) if until is None else until
    assert model.unet_evaluations == sum(batches) == 6 * calls
    assert calls == {None: 6 if scheduler == "pndm" else 5, 2: 2}[until]
    model.predict(latents_of(model), 500, model.encode(PROMPTS))
    assert model.unet_evaluations == 6 * calls + 3


def test_encode_embeddings_equals_encode_ids(tiny_model: TextToImage):
    ids = tiny_model.tokenize(PROMPTS)
    ends = (ids == tiny_model.tokenizer.eos_token_id).int().argmax(dim=1)
    from_rows = tiny_model.encode_embeddings(tiny_model.vocabulary[ids], ends)
    assert torch.equal(from_rows, tiny_model.encode_ids(ids))
    assert torch.equal(tiny_model.encode(PROMPTS), tiny_model.encode_ids(ids))


def test_encode_embeddings_is_differentiable_and_leaves_no_hook(tiny_model: TextToImage):
    before = tiny_model.encode(PROMPTS)
    rows = tiny_model.vocabulary[tiny_model.tokenize(PROMPTS)].clone().requires_grad_(True)
    tiny_model.encode_embeddings(rows, torch.tensor([3, 6, 7])).square().sum().backward()
    assert (rows.grad.abs().sum(dim=2) > 0).all()
    assert torch.equal(tiny_model.encode(PROMPTS), before)


@pytest.mark.parametrize("until", [0, 1, 3])
def test_until_stops_where_a_loop_by_hand_stops(tiny_model: TextToImage, until: int):
    text, empty = tiny_model.encode(PROMPTS), tiny_model.encode([""])
    latents = tiny_model.initial_latents(SEEDS)
    scheduler = tiny_model.make_scheduler(5)
    timesteps = tiny_model.sampling_timesteps(5)
    for step in range(until):
        noise = tiny_model.guided(latents, timesteps[step], text, empty, 7.5)
        latents = scheduler.step(noise, timesteps[step], latents).prev_sample
    sampled = tiny_model.sample(text, seeds=SEEDS, steps=5, guidance=7.5, until=until)
    torch.testing.assert_close(sampled, latents, atol=1e-5, rtol=0)


def test_ddim_follows_its_formula(tiny_model64: TextToImage):
    """x_s = sqrt(a_s) (x_t - sqrt(1 - a_t) e) / sqrt(a_t) + sqrt(1 - a_s) e, with SD's betas from scratch."""
    model, steps = tiny_model64, 5
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, dim=0)
    text, empty = model.encode(PROMPTS), model.encode([""])
    latents = torch.stack(
        [torch.randn(model.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS]
    ).double()
    for timestep in (801, 601, 401, 201, 1):
        unguided = model.predict(latents, timestep, empty.expand_as(text))
        noise = unguided + 7.5 * (model.predict(latents, timestep, text) - unguided)
        now, after = alphas[timestep], alphas[max(timestep - 200, 0)]
        clean = (latents - (1 - now).sqrt() * noise) / now.sqrt()
        latents = after.sqrt() * clean + (1 - after).sqrt() * noise
    sampled = model.sample(text, seeds=SEEDS, steps=steps, guidance=7.5)
    # diffusers keeps its alphas in float32.
    torch.testing.assert_close(sampled, latents, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("scheduler", "guidance"), [*((name, 7.5) for name in SCHEDULERS), *(("ddim", scale) for scale in (0, 0.5, 1, 1.1))]
)
def test_pictures_are_those_of_plain_diffusers(pipeline: StableDiffusionPipeline, scheduler: str, guidance: float):
    options = {"skip_prk_steps": True} if scheduler == "pndm" else {}
    model = TextToImage(pipeline, scheduler=scheduler)
    pictures = model.generate(PROMPTS, seeds=SEEDS, steps=4, guidance=guidance)
    assert model.unet_evaluations == len(PROMPTS) * len(model.sampling_timesteps(4)) * (2 if guidance > 1 else 1)
    assert model.evaluations_per_step(guidance) == (2 if guidance > 1 else 1)

    pipeline.scheduler = SCHEDULERS[scheduler].from_config(pipeline.scheduler.config, **options)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPTS,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        num_inference_steps=4,
        guidance_scale=guidance,
        output_type="np",
    ).images
    expected = torch.from_numpy((theirs * 255).round().astype(np.int16)).permute(0, 3, 1, 2)
    assert expected.float().std() > 1
    assert (pictures.short() - expected).abs().max() <= 1


@pytest.mark.parametrize("part", ["network", "text_encoder", "vae"])
def test_fingerprint_changes_with_one_weight_of_any_part(tiny_model: TextToImage, tokenizer_folder: Path, part: str):
    fingerprint = tiny_model.fingerprint()
    tiny_model.generate(PROMPTS[:1], seeds=[0], steps=1, guidance=1.0)
    assert tiny_model.fingerprint() == fingerprint
    assert TextToImage(make_tiny_pipeline(tokenizer_folder), name="twin").fingerprint() == fingerprint
    weight = list(getattr(tiny_model, part).parameters())[-1]
    weight.data.flatten()[0] += 1e-3
    assert tiny_model.fingerprint() != fingerprint


def test_trainable_lets_gradients_into_the_named_weights_and_freezes_again(tiny_model: TextToImage):
    every = [*tiny_model.network.parameters(), *tiny_model.vae.parameters(), *tiny_model.text_encoder.parameters()]
    assert not any(parameter.requires_grad for parameter in every)
    wanted = [value for name, value in tiny_model.network.named_parameters() if "attn2.to_k" in name]
    text = tiny_model.encode(PROMPTS)
    with tiny_model.trainable(wanted):
        tiny_model.predict(latents_of(tiny_model), 500, text).square().sum().backward()
        assert all(parameter.grad is not None for parameter in wanted)
        assert sum(parameter.grad is not None for parameter in every) == len(wanted)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in every)

    with pytest.raises(RuntimeError, match="stop"), tiny_model.trainable(wanted):
        raise RuntimeError("stop")
    assert not any(parameter.requires_grad for parameter in every)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_gives_nearly_the_same_pictures(tokenizer_folder: Path, tiny_model: TextToImage, autocast: bool):
    pipeline = make_tiny_pipeline(tokenizer_folder)
    model = TextToImage(pipeline, autocast=torch.bfloat16) if autocast else TextToImage(pipeline.to(torch.bfloat16))
    options = {"seeds": SEEDS, "steps": 3, "guidance": 3.0}
    pictures, expected = model.generate(PROMPTS, **options), tiny_model.generate(PROMPTS, **options)
    assert model.dtype == (torch.float32 if autocast else torch.bfloat16)
    assert not torch.equal(pictures, expected)
    assert (pictures.float() - expected.float()).abs().mean() < 4


def test_latents_may_have_any_number_of_channels(pipeline: StableDiffusionPipeline):
    unet = UNet2DConditionModel.from_config({**pipeline.unet.config, "in_channels": 8, "out_channels": 8})
    vae = AutoencoderKL.from_config({**pipeline.vae.config, "latent_channels": 8})
    pipeline.unet, pipeline.vae = unet, vae
    model = TextToImage(pipeline)
    assert model.latent_shape == (8, 8, 8)
    pictures = model.generate(PROMPTS, seeds=SEEDS, steps=2, guidance=7.5)
    assert (pictures.shape, pictures.dtype) == ((3, 3, *model.image_size), torch.uint8)
    assert model.encode_images(pictures).shape == (3, *model.latent_shape)


def test_each_picture_has_its_own_guidance(tiny_model64: TextToImage):
    text, scales = tiny_model64.encode(PROMPTS), [1.0, 7.5, 3.0]
    together = tiny_model64.sample(text, seeds=SEEDS, steps=3, guidance=scales)
    for number, scale in enumerate(scales):
        rows = slice(number, number + 1)
        alone = tiny_model64.sample(text[rows], seeds=SEEDS[rows], steps=3, guidance=scale)
        torch.testing.assert_close(alone, together[rows], atol=1e-9, rtol=0)


def test_without_guidance_a_picture_is_the_same_in_any_company(tiny_model64: TextToImage):
    text = tiny_model64.encode(PROMPTS)
    together = tiny_model64.sample(text, seeds=SEEDS, steps=3, guidance=[0.0, 7.5, 1.0])
    for row, scale in ((0, 1.0), (2, 0.3)):
        alone = tiny_model64.sample(text[[row]], seeds=[SEEDS[row]], steps=3, guidance=scale)
        torch.testing.assert_close(together[[row]], alone, atol=1e-9, rtol=0)


def test_tokens_are_counted_beyond_what_the_encoder_takes(tiny_model: TextToImage):
    most = tiny_model.max_tokens
    prompts = ["", "a church", " ".join(["church"] * (most - 2)), " ".join(["church"] * (most + 5))]
    per_word = tiny_model.token_counts(["church"])[0] - 2
    assert tiny_model.token_counts(prompts) == [
        2,
        tiny_model.token_counts(["a"])[0] + per_word,
        2 + (most - 2) * per_word,
        2 + (most + 5) * per_word,
    ]
    assert tiny_model.token_counts([]) == []


class Doubled(Guard):
    """Text carries itself twice, the U-Net is given the second half; guidance is 4 whatever is asked for."""

    evaluations_per_step = 3
    always_guides = True

    def read(self, token_embeddings: Tensor, eos_positions: Tensor, encode: Encode) -> Tensor:
        text = encode(token_embeddings, eos_positions)
        return torch.cat([torch.zeros_like(text), text], dim=1)

    def condition(self, text: Tensor, timesteps: Tensor) -> Tensor:
        return text[:, text.shape[1] // 2 :]

    def guidance(self, model: TextToImage, steps: Iterable[int] | None = None) -> Guidance:
        return lambda latents, timesteps, text, unconditional, scales: model.guided(
            latents, timesteps, text, unconditional, 4.0
        )


def test_a_guard_that_does_nothing_changes_no_bit(tiny_model: TextToImage):
    text = tiny_model.encode(PROMPTS)
    expected = tiny_model.sample(text, seeds=SEEDS, steps=3, guidance=4.0)
    tiny_model.guard = Guard()
    assert torch.equal(tiny_model.encode(PROMPTS), text)
    assert torch.equal(tiny_model.sample(text, seeds=SEEDS, steps=3, guidance=4.0), expected)
    assert [tiny_model.evaluations_per_step(guidance) for guidance in (1.0, 4.0)] == [1, 2]


def test_a_guard_reads_text_conditions_the_unet_and_guides(tiny_model: TextToImage):
    expected = tiny_model.sample(tiny_model.encode(PROMPTS), seeds=SEEDS, steps=3, guidance=4.0)
    tiny_model.guard = Doubled()
    text = tiny_model.encode(PROMPTS)
    assert text.shape[1] == 2 * tiny_model.max_tokens
    torch.testing.assert_close(tiny_model.sample(text, seeds=SEEDS, steps=3, guidance=1.0), expected)
    assert tiny_model.evaluations_per_step(1.0) == 3


def test_a_guard_reads_token_embeddings_as_it_reads_ids(tiny_model: TextToImage):
    tiny_model.guard = Doubled()
    ids = tiny_model.tokenize(PROMPTS)
    ends = (ids == tiny_model.tokenizer.eos_token_id).int().argmax(1)
    torch.testing.assert_close(
        tiny_model.encode_embeddings(tiny_model.vocabulary[ids], ends), tiny_model.encode(PROMPTS)
    )


def test_velocity_is_converted_to_noise(tiny_model64: TextToImage, tokenizer_folder: Path):
    """v = sqrt(a) e - sqrt(1 - a) x_0 and x_t = sqrt(a) x_0 + sqrt(1 - a) e give e = sqrt(a) v + sqrt(1 - a) x_t."""
    pipeline = make_tiny_pipeline(tokenizer_folder).to(torch.float64)
    pipeline.scheduler.register_to_config(prediction_type="v_prediction")
    model = TextToImage(pipeline)
    latents, text, timesteps = latents_of(model), model.encode(PROMPTS), torch.tensor([1, 500, 999])
    velocity = tiny_model64.predict(latents, timesteps, text)
    noise = model.predict(latents, timesteps, text)
    for row, timestep in enumerate(timesteps):
        alpha = float(model.process.alphas[timestep])
        expected = alpha**0.5 * velocity[row] + (1 - alpha) ** 0.5 * latents[row]
        torch.testing.assert_close(noise[row], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_velocity_models_sample_with_every_scheduler(pipeline: StableDiffusionPipeline, scheduler: str):
    pipeline.scheduler.register_to_config(prediction_type="v_prediction")
    model = TextToImage(pipeline, scheduler=scheduler)
    assert model.generate(PROMPTS[:1], seeds=[0], steps=3, guidance=2.0).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guided_by", ["model", nightly("guard")])
def test_pictures_are_those_of_diffusers_with_every_sampler_and_prediction(
    pipeline: StableDiffusionPipeline, scheduler: str, prediction: str, guided_by: str
):
    pipeline.scheduler = SCHEDULERS[scheduler].from_config(
        {**pipeline.scheduler.config, "prediction_type": prediction, **SCHEDULER_OPTIONS.get(scheduler, {})}
    )
    pipeline.to(torch.float64)
    model = TextToImage(pipeline, scheduler=scheduler)
    noise = model.initial_latents(SEEDS)
    expected = pipeline(
        PROMPTS, latents=noise, num_inference_steps=7, guidance_scale=4.0, output_type="latent", return_dict=False
    )[0]
    if guided_by == "guard":
        model.guard = Doubled()
    latents = model.sample(model.encode(PROMPTS), seeds=SEEDS, steps=7, guidance=4.0)
    assert (latents - expected).abs().max() < 1e-5 * expected.abs().max()


def test_velocity_at_a_timestep_between_two_is_converted_with_its_own_noise_level(pipeline: StableDiffusionPipeline):
    pipeline.scheduler.register_to_config(prediction_type="v_prediction")
    model = TextToImage(pipeline.to(torch.float64))
    sampler = LMSDiscreteScheduler.from_config(pipeline.scheduler.config)
    sampler.set_timesteps(7)
    latents, timestep, sigma = latents_of(model), sampler.timesteps[3], float(sampler.sigmas[3])
    assert timestep % 1 > 0.1
    noise = model.predict(latents, timestep, model.encode(PROMPTS))
    velocity = model.as_told(noise, latents, timestep)
    # With x_0 = alpha x_t - sigma_t v, as diffusers has it.
    clean = (latents - sigma / (sigma**2 + 1) ** 0.5 * noise) * (sigma**2 + 1) ** 0.5
    wanted = latents / (sigma**2 + 1) ** 0.5 - velocity * sigma / (sigma**2 + 1) ** 0.5
    torch.testing.assert_close(clean, wanted, atol=1e-5, rtol=1e-5)


def test_gradients_and_text_encodings_are_counted_apart_from_evaluations(tiny_model: TextToImage):
    rows = tiny_model.token_embeddings(tiny_model.tokenize(PROMPTS)).requires_grad_()
    text = tiny_model.encode_embeddings(rows, torch.tensor([3, 6, 7]))
    tiny_model.predict(latents_of(tiny_model), 500, text).sum().backward()
    assert (tiny_model.unet_evaluations, tiny_model.unet_gradients, tiny_model.text_encodings) == (3, 3, 3)
    noise = latents_of(tiny_model).requires_grad_()
    predict = partial(tiny_model.predict, timesteps=500, text=text.detach())
    checkpoint(predict, noise, use_reentrant=False).sum().backward()
    assert (tiny_model.unet_evaluations, tiny_model.unet_gradients, tiny_model.text_encodings) == (9, 6, 3)
    tiny_model.generate(PROMPTS, seeds=SEEDS, steps=2, guidance=1.0)
    assert (tiny_model.unet_evaluations, tiny_model.unet_gradients, tiny_model.text_encodings) == (15, 6, 7)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("until", [0, 2])
def test_partly_denoised_latents_have_the_unets_scale(pipeline: StableDiffusionPipeline, scheduler: str, until: int):
    """What ``until`` returns goes into ``predict``: it must match what the U-Net sees at that step."""
    model = TextToImage(pipeline, scheduler=scheduler)
    seen: list[Tensor] = []
    model.network.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    text = model.encode(PROMPTS)
    model.sample(text, seeds=SEEDS, steps=5, guidance=1.0)
    latents = model.sample(text, seeds=SEEDS, steps=5, guidance=1.0, until=until)
    torch.testing.assert_close(latents, seen[until], atol=1e-4, rtol=0)


def test_add_noise_follows_its_formula(tiny_model64: TextToImage):
    latents, noise = latents_of(tiny_model64), latents_of(tiny_model64, seed=1)
    noisy = tiny_model64.add_noise(latents, noise, torch.tensor([0, 400, 999]))
    for row, timestep in enumerate((0, 400, 999)):
        alpha = float(tiny_model64.process.alphas[timestep])
        expected = alpha**0.5 * latents[row] + (1 - alpha) ** 0.5 * noise[row]
        torch.testing.assert_close(noisy[row], expected, atol=1e-6, rtol=0)


def test_pictures_and_latents_follow_the_autoencoder(tiny_model: TextToImage):
    latents = latents_of(tiny_model)
    factor = tiny_model.vae.config.scaling_factor
    pictures = tiny_model.decode(latents, batch_size=2)
    decoded = tiny_model.vae.decode(latents / factor).sample
    expected = ((decoded + 1) * 127.5).clamp(0, 255)
    assert pictures.dtype == torch.uint8
    assert (pictures.float() - expected).abs().max() <= 0.51
    means = tiny_model.vae.encode(pictures.float() / 255 * 2 - 1).latent_dist.mean
    torch.testing.assert_close(tiny_model.encode_images(pictures, batch_size=2), means * factor, atol=1e-5, rtol=1e-5)


def test_nothing_gives_nothing(tiny_model: TextToImage):
    text = tiny_model.encode(PROMPTS)[:0]
    latents = tiny_model.sample(text, seeds=[], steps=2, guidance=7.5)
    assert latents.shape == (0, *tiny_model.latent_shape)
    assert tiny_model.decode(latents).shape == (0, 3, *tiny_model.image_size)
    assert tiny_model.unet_evaluations == 0
    assert tiny_model.encode_images(torch.empty((0, 3, 16, 16), dtype=torch.uint8)).shape == latents.shape
    assert tiny_model.generate([], seeds=[], steps=2, guidance=7.5).shape == (0, 3, *tiny_model.image_size)


def test_mismatched_numbers_and_unknown_schedulers_are_refused(
    tiny_model: TextToImage, pipeline: StableDiffusionPipeline
):
    text = tiny_model.encode(PROMPTS)
    with pytest.raises(ValueError, match="3 texts, 2 seeds and 3 guidance scales"):
        tiny_model.sample(text, seeds=[1, 2], steps=2, guidance=7.5)
    with pytest.raises(ValueError, match="3 texts, 3 seeds and 1 guidance scales"):
        tiny_model.sample(text, seeds=SEEDS, steps=2, guidance=[7.5])
    with pytest.raises(
        ValueError, match=r"scheduler is 'heun'; it must be one of ddim, lms, pndm, dpmsolver\+\+, euler"
    ):
        TextToImage(pipeline, scheduler="heun")
