"""A text-to-image diffusion model behind one small interface, whatever its size and origin."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, get_args

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor, nn

from diffusion.finite import overflow_remedy, require_finite
from diffusion.guard import Guard, Guidance
from diffusion.memory import visiting
from diffusion.noise_schedule import Prediction, as_noise, at_least_float32, betas_of, without_zeros
from diffusion.text_encoders import TextEncoderPair
from diffusion.tokenizer import CleaningTokenizer

SCHEDULERS: dict[str, type] = {
    "ddim": DDIMScheduler,
    "lms": LMSDiscreteScheduler,
    "pndm": PNDMScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
}
"""The samplers on offer. One of them serves every method that is compared."""

SCHEDULER_OPTIONS: dict[str, dict[str, bool]] = {"ddim": {"clip_sample": False}, "pndm": {"skip_prk_steps": True}}
"""What Stable Diffusion asks of a sampler, whatever the checkpoint's own scheduler was."""

_SCHEDULER_ORIGIN = {"_class_name", "_diffusers_version"}

UNGUIDED = 1.0
"""The guidance scale at which a picture is the prompt's alone. Lower ones mean the same, as in diffusers: the formula
of guidance would lead to the empty prompt at 0."""


def is_guided(guidance: float) -> bool:
    """Whether pictures of this guidance scale need the empty prompt beside their own."""
    return guidance > UNGUIDED


class TextToImage:
    """Stable Diffusion's parts with an exact count of what they cost.

    Text embeddings are float [n, tokens, width]; latents are float [n, c, h, w] in the U-Net's scale; timesteps are
    0 .. 999; images are uint8 [n, 3, H, W]. With two text encoders (SDXL) text has one more row than tokens, see
    :class:`diffusion.text_encoders.TextEncoderPair`.

    Args:
        pipeline: A loaded diffusers pipeline; its parts are used, not copied.
        name: What results call the model.
        scheduler: One of :data:`SCHEDULERS`.
        autocast: Precision of the U-Net's arithmetic when it differs from that of the weights.
        resolution: Edge of a square picture in pixels, or width and height; the U-Net's own if None.
        offload: The VAE waits on the CPU while it is not used.

    Attributes:
        unet_evaluations: Samples that went through the U-Net's forward pass since the model was made. A guided step
            of one picture counts two; a batch of eight, unguided, counts eight.
        unet_gradients: Samples whose gradient went back through the U-Net, which costs about two evaluations each and
            is counted apart from them.
        text_encodings: Texts that went through the text encoder (of SDXL, through both at once).
        guard: A defence at inference, if one stands before the model.
        pair: The two text encoders of SDXL; None if the model has one.

    Raises:
        ValueError: Unknown scheduler, a resolution that the model cannot have, two tokenizers that differ, or a U-Net
            that takes more than latents.
    """

    def __init__(
        self,
        pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline,
        *,
        name: str = "pipeline",
        scheduler: str = "ddim",
        autocast: torch.dtype | None = None,
        resolution: int | tuple[int, int] | None = None,
        offload: bool = False,
    ) -> None:
        if scheduler not in SCHEDULERS:
            raise ValueError(f"scheduler is {scheduler!r}; it must be one of {', '.join(SCHEDULERS)}.")
        self.name = name
        self.tokenizer = CleaningTokenizer(pipeline.tokenizer)
        self.text_encoder = pipeline.text_encoder
        self.pair = TextEncoderPair(pipeline) if isinstance(pipeline, StableDiffusionXLPipeline) else None
        self.unet = pipeline.unet
        self.vae = pipeline.vae
        self.scheduler_name = scheduler
        self.autocast = autocast
        self.resolution = resolution
        self.offload = offload
        self._scheduler_config = dict(pipeline.scheduler.config)
        trained = DDIMScheduler.from_config(self._scheduler_config).alphas_cumprod
        self._reaches_pure_noise = not bool(trained.all())
        self.alphas_cumprod: Tensor = without_zeros(trained)
        self.unet_evaluations = 0
        self.unet_gradients = 0
        self.text_encodings = 0
        self.guard: Guard | None = None
        for part in (*self._text_encoders, self.unet, self.vae):
            part.eval().requires_grad_(False)
        if self.pair is not None and self.vae.config.force_upcast and self.vae.dtype == torch.float16:
            # SDXL's own VAE overflows there; those of Stable Diffusion 1 and 2 have the flag by default and do not.
            self.vae.to(torch.float32)
        if getattr(self.vae.config, "latents_mean", None) is not None:
            raise ValueError(f"The VAE of {name!r} shifts its latents (latents_mean), which is not supported.")
        if self.prediction_type not in get_args(Prediction):
            raise ValueError(
                f"The scheduler's prediction_type of {name!r} is {self.prediction_type!r}; it must be one of "
                f"{', '.join(get_args(Prediction))}."
            )
        if self._reaches_pure_noise and self.prediction_type == "epsilon":
            raise ValueError(
                f"The noise schedule of {name!r} ends in pure noise (rescale_betas_zero_snr), where its "
                "prediction_type 'epsilon' says nothing of the picture; correct the scheduler's configuration."
            )
        if (channels := self.unet.config.in_channels) != (latent_channels := self.vae.config.latent_channels):
            raise ValueError(
                f"The U-Net of {name!r} takes {channels} channels and the latents of its VAE have {latent_channels}; "
                "models of inpainting (9), editing (8) and depth (5) draw from more than a text and cannot be used: "
                "choose a text-to-image model."
            )
        if offload:
            self.vae.to("cpu")
        edges = () if resolution is None else (resolution,) if isinstance(resolution, int) else resolution
        if any(edge < self._multiple or edge % self._multiple for edge in edges):
            shown = resolution if isinstance(resolution, int) else list(edges)
            raise ValueError(f"resolution is {shown}; {name!r} takes a multiple of {self._multiple} pixels.")

    @property
    def device(self) -> torch.device:
        """Where the U-Net lives."""
        return next(self._weights).device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the U-Net's weights."""
        return next(weight.dtype for weight in self._weights if weight.is_floating_point())

    @property
    def _weights(self) -> Iterator[Tensor]:
        """Those of the U-Net; diffusers looks through all of its modules for hooks each time that it is asked for one.

        That is a tenth of a step of a small U-Net, and on a GPU time in which nothing new is queued.
        """
        return self.unet.parameters()  # type: ignore[no-any-return]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one picture's latents."""
        if self.resolution is None:
            size = self.unet.config.sample_size
            height, width = (size, size) if isinstance(size, int) else size
        else:
            pixels = (self.resolution, self.resolution) if isinstance(self.resolution, int) else self.resolution
            width, height = (edge // self._pixels_per_latent for edge in pixels)
        return self.unet.config.in_channels, height, width

    @property
    def training_timesteps(self) -> int:
        """Number of timesteps of the noise schedule (1000 for Stable Diffusion)."""
        return len(self.alphas_cumprod)

    @property
    def noise_schedule(self) -> dict[str, Any]:
        """What the checkpoint says of its noise: the configuration of its scheduler."""
        return self._scheduler_config

    @property
    def prediction_type(self) -> str:
        """What the U-Net was trained to predict; one of :data:`diffusion.noise_schedule.Prediction`."""
        return str(self._scheduler_config.get("prediction_type", "epsilon"))

    @property
    def vocabulary(self) -> Tensor:
        """The token embedding table, float [vocabulary, width]; of two text encoders side by side."""
        if self.pair is not None:
            return self.pair.vocabulary
        return self.text_encoder.get_input_embeddings().weight  # type: ignore[no-any-return]

    def token_embeddings(self, ids: Tensor) -> Tensor:
        """Rows of :attr:`vocabulary`, int64 [...] to float [..., width]."""
        return self.vocabulary[ids] if self.pair is None else self.pair.look_up(ids)

    @property
    def text_shape(self) -> tuple[int, int]:
        """Rows and width of one prompt's text embedding."""
        return self.max_tokens + (self.pair is not None), self.vocabulary.shape[1]

    @property
    def max_tokens(self) -> int:
        """Positions of the text encoder, start and end tokens included."""
        # A tokenizer that was saved without a length takes texts of any.
        positions = (int(encoder.config.max_position_embeddings) for encoder in self._text_encoders)
        return min(int(self.tokenizer.model_max_length), *positions)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids, int64 [n, max_tokens], cut and padded."""
        padded = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        )
        return padded.input_ids.to(self.device)  # type: ignore[no-any-return]

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, start and end included; what is beyond :attr:`max_tokens` is cut off."""
        return [len(ids) for ids in self.tokenizer(list(prompts), verbose=False).input_ids] if prompts else []

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings of ``prompts``, float [n, tokens, width]."""
        return self.encode_ids(self.tokenize(prompts))

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], *, batch_size: int = 256) -> Tensor:
        """Text embeddings of any number of prompts without gradients, float [n, tokens, width]."""
        starts = range(0, len(prompts), batch_size)
        text = torch.cat([self.encode(prompts[start : start + batch_size]) for start in starts])
        require_finite(text, f"Text embeddings of {self.name!r}", self._remedy)
        return text

    def encode_tokens(self, prompts: Sequence[str]) -> Tensor:
        """Of :meth:`encode_prompts` the rows that cross-attention sees, float [n, max_tokens, width]."""
        return self.encode_prompts(prompts)[:, : self.max_tokens]

    def require_one_text_encoder(self, what: str) -> None:
        """Refuse a method that knows of no second text encoder.

        Args:
            what: The method, as the start of a sentence.

        Raises:
            ValueError: The model has two.
        """
        if self.pair is not None:
            raise ValueError(
                f"{what} works with one text encoder and {self.name!r} has two; choose another method, or a model of "
                "Stable Diffusion 1 or 2."
            )

    def encode_ids(self, ids: Tensor) -> Tensor:
        """Text embeddings of token ids int64 [n, tokens]; float [n, tokens, width]."""
        ids = ids.to(self.text_encoder.device)
        if self.guard is None:
            return self._read_ids(ids)
        return self.guard.read(self.token_embeddings(ids), self._ends(ids), self._read_embeddings)

    def encode_embeddings(self, token_embeddings: Tensor, eos_positions: Tensor) -> Tensor:
        """Text embeddings of a sequence that is given by its token embeddings, differentiable in them.

        Args:
            token_embeddings: float [n, tokens, width], what the embedding table would return (no positions added).
            eos_positions: int64 [n], where each sequence ends.

        Returns:
            float [n, tokens, width].
        """
        if self.guard is None:
            return self._read_embeddings(token_embeddings, eos_positions)
        return self.guard.read(token_embeddings, eos_positions, self._read_embeddings)

    def _read_ids(self, ids: Tensor) -> Tensor:
        self.text_encodings += len(ids)
        if self.pair is not None:
            return self.pair.read_ids(ids, self._ends(ids)).to(self.dtype)
        return self.text_encoder(ids).last_hidden_state.to(self.dtype)  # type: ignore[no-any-return]

    def _ends(self, ids: Tensor) -> Tensor:
        return (ids == self.tokenizer.eos_token_id).int().argmax(1)  # type: ignore[no-any-return]

    def _read_embeddings(self, token_embeddings: Tensor, eos_positions: Tensor) -> Tensor:
        ids = torch.zeros(token_embeddings.shape[:2], dtype=torch.int64, device=token_embeddings.device)
        ids.scatter_(1, eos_positions[:, None], self.tokenizer.eos_token_id)
        if self.pair is not None:
            self.text_encodings += len(ids)
            return self.pair.read_embeddings(token_embeddings, ids, eos_positions).to(self.dtype)
        # The encoder takes ids only; a hook on its table hands it our rows and leaves masks and positions to it.
        table = self.text_encoder.get_input_embeddings()
        hook = table.register_forward_hook(lambda *_: token_embeddings)
        try:
            return self._read_ids(ids)
        finally:
            hook.remove()

    def predict_noise(self, latents: Tensor, timesteps: Tensor | int, text: Tensor) -> Tensor:
        """The U-Net's noise prediction, float [n, c, h, w]; ``timesteps`` is one for all or int64 [n].

        What predicts velocity or the picture is converted, in float32 at least, so that every method may think in
        noise.
        """
        timesteps = torch.as_tensor(timesteps, device=latents.device).expand(len(latents))
        output = self._predict(latents, timesteps, text)
        if self.prediction_type == "v_prediction":
            return as_noise(output, latents, self._alphas(timesteps, output), self.prediction_type)
        return output

    def as_trained(self, noise: Tensor, latents: Tensor, timesteps: Tensor | int) -> Tensor:
        """What the samplers are to be told where a prediction comes to ``noise``.

        A sampler that combines the predictions of several steps, as PNDM does, gives another picture if it is told
        noise by a model that predicts velocity. So no noise of such a model is given to a sampler as it is.

        Args:
            noise: float [n, c, h, w], a prediction, or several weighted by numbers that sum to 1.
            latents: float [n, c, h, w], what it is the noise of.
            timesteps: One for all or int64 [n].
        """
        if self.prediction_type != "v_prediction":
            return noise
        alphas = self._alphas(torch.as_tensor(timesteps, device=latents.device).expand(len(latents)), latents)
        return (noise - (1 - alphas).sqrt() * latents) / alphas.sqrt()

    def _predict(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """What the samplers are told: velocity of a U-Net that predicts it, else noise, float [n, c, h, w].

        Not every sampler takes a prediction of the picture, and none makes another picture of the noise in its place.
        """
        self.unet_evaluations += len(latents)
        if self.guard is not None:
            text = self.guard.condition(text, timesteps)
        with torch.autocast(latents.device.type, self.autocast, enabled=self.autocast is not None):
            output = self._run_unet(latents.to(self.dtype), timesteps, text)
        if output.requires_grad:
            output.register_hook(self._count_gradients)
        if self.prediction_type == "sample":
            return as_noise(output, latents, self._alphas(timesteps, output), self.prediction_type)
        return output

    def _count_gradients(self, gradient: Tensor) -> None:
        self.unet_gradients += len(gradient)

    def _run_unet(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        if self.pair is None:
            return self.unet(latents, timesteps, text).sample  # type: ignore[no-any-return]
        tokens, pooled = self.pair.split(text)
        # Original size, upper left corner of the crop, and size of the picture: a whole one of the size asked for.
        size = self.image_size
        time_ids = torch.tensor([*size, 0, 0, *size], dtype=text.dtype, device=text.device).expand(len(text), -1)
        added = {"text_embeds": pooled, "time_ids": time_ids}
        return self.unet(latents, timesteps, tokens, added_cond_kwargs=added).sample  # type: ignore[no-any-return]

    def guided_noise(
        self, latents: Tensor, timesteps: Tensor | int, text: Tensor, unconditional: Tensor, guidance: float | Tensor
    ) -> Tensor:
        """Classifier-free guidance, both halves in one batch: e_0 + guidance * (e_c - e_0).

        Args:
            latents: float [n, c, h, w].
            timesteps: One for all or int64 [n].
            text: float [n, tokens, width].
            unconditional: float [tokens, width] or [n, tokens, width], the empty prompt's embedding.
            guidance: One for all or float [n].
        """
        return self._guided(self.predict_noise, latents, timesteps, text, unconditional, guidance)

    def _guided(
        self,
        predict: Callable[[Tensor, Tensor, Tensor], Tensor],
        latents: Tensor,
        timesteps: Tensor | int,
        text: Tensor,
        unconditional: Tensor,
        guidance: float | Tensor,
    ) -> Tensor:
        timesteps = torch.as_tensor(timesteps, device=latents.device).expand(len(latents))
        unconditional = unconditional.expand_as(text)
        if self.guard is not None:
            unconditional = self.guard.pair(unconditional, text)
        both = torch.cat([unconditional, text])
        without, conditional = predict(latents.repeat(2, 1, 1, 1), timesteps.repeat(2), both).chunk(2)
        scale = torch.as_tensor(guidance, device=latents.device, dtype=at_least_float32(latents.dtype))
        scale = scale.reshape(-1, 1, 1, 1)
        return without + scale * (conditional - without)

    def guidance(self, steps: Iterable[int] | None = None) -> Guidance:
        """The guidance of one batch of pictures from the first sampler step to the last: the guard's, if there is one.

        It may remember what it was given, so every batch and every pass over the steps takes a new one.

        Args:
            steps: Which sampler steps it is asked for in turn, if not for all in their order.
        """
        return self.guided_noise if self.guard is None else self.guard.guidance(self, steps)

    def is_guided(self, guidance: float) -> bool:
        """Whether a picture of this guidance scale needs more than the prediction for its prompt."""
        return is_guided(guidance) or (self.guard is not None and self.guard.always_guides)

    def evaluations_per_step(self, guidance: float) -> int:
        """U-Net evaluations of one picture's sampler step at this guidance scale."""
        if not self.is_guided(guidance):
            return 1
        return 2 if self.guard is None else self.guard.evaluations_per_step

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, float [n, c, h, w]."""
        alphas = self._alphas(torch.as_tensor(timesteps, device=latents.device).expand(len(latents)), latents)
        return (alphas.sqrt() * latents + (1 - alphas).sqrt() * noise).to(latents.dtype)

    def initial_latents(self, seeds: Sequence[int]) -> Tensor:
        """Unit Gaussian noise, float [n, c, h, w]; each picture from a CPU generator with its own seed.

        That is what the seeds of published prompt sets mean, so it is torch's own seeding here (which keeps the lowest
        32 bits) and no stream of :mod:`diffusion.streams`.

        Raises:
            ValueError: A seed is negative or has more than 64 bits.
        """
        for seed in seeds:
            if not 0 <= seed < 2**64:
                raise ValueError(f"seed is {seed}; the seed of a picture must be from 0 to 2^64 - 1.")
        noise = torch.empty((len(seeds), *self.latent_shape))
        for picture, seed in zip(noise, seeds, strict=True):
            picture.normal_(generator=torch.Generator().manual_seed(seed))
        return noise.to(self.device, self.dtype)

    @torch.no_grad()
    def sample(
        self,
        text: Tensor,
        *,
        seeds: Sequence[int],
        steps: int,
        guidance: float | Sequence[float],
        noise: Tensor | None = None,
        start: int = 0,
        until: int | None = None,
        batch_size: int = 64,
    ) -> Tensor:
        """Denoise from noise; picture ``i`` depends on ``text[i]`` and ``seeds[i]`` alone.

        Args:
            text: float [n, tokens, width].
            seeds: One seed per picture.
            steps: Sampler steps from noise to picture.
            guidance: Guidance scale, one for all or one per picture; 1 or less is the prompt alone, without the
                unconditional half, as in diffusers.
            noise: If given, float [n, c, h, w], the noise to start from, of unit variance, in place of the seeds'.
            start: The step that takes the noise; those before it are left out.
            until: If given, stop before step ``until``: what the U-Net would be given at timestep
                ``sampling_timesteps(steps)[until]`` (the initial noise for 0).
            batch_size: Pictures at a time; it changes speed and memory only.

        Returns:
            Latents, float [n, c, h, w].

        Raises:
            ValueError: Numbers of texts, seeds and guidance scales differ.
            NotFiniteError: The latents are infinite or NaN.
        """
        scales = torch.full((len(text),), guidance) if isinstance(guidance, (int, float)) else torch.tensor(guidance)
        if not len(text) == len(seeds) == len(scales):
            raise ValueError(f"{len(text)} texts, {len(seeds)} seeds and {len(scales)} guidance scales do not match.")
        scales = scales.clamp(min=UNGUIDED)
        unconditional = self.encode([""])
        noise = self.initial_latents(seeds) if noise is None else noise
        chunks = [self.initial_latents([])]
        chunks += [
            self._denoise(
                text[first : first + batch_size],
                noise[first : first + batch_size],
                unconditional,
                scales[first : first + batch_size].to(self.device, at_least_float32(self.dtype)).clamp(min=1),
                steps=steps,
                start=start,
                until=until,
            )
            for first in range(0, len(text), batch_size)
        ]
        latents = torch.cat(chunks)
        require_finite(latents, f"Latents that {self.name!r} samples in {steps} steps", self._remedy)
        return latents

    def _denoise(
        self,
        text: Tensor,
        latents: Tensor,
        unconditional: Tensor,
        scales: Tensor,
        *,
        steps: int,
        start: int,
        until: int | None,
    ) -> Tensor:
        scheduler = self.make_scheduler(steps)
        latents = latents * scheduler.init_noise_sigma
        guided = any(map(self.is_guided, scales.tolist()))
        # A guard's own guidance thinks in noise.
        guidance = self.guidance() if self.guard is not None and self.guard.always_guides else None
        for timestep in scheduler.timesteps[start:until]:
            scaled = scheduler.scale_model_input(latents, timestep).to(latents.dtype)
            timesteps = timestep.to(self.device).expand(len(scaled))
            if guidance is not None:
                noise = guidance(scaled, timesteps, text, unconditional, scales)
                output = self.as_trained(noise, scaled, timesteps)
            elif guided:
                output = self._guided(self._predict, scaled, timesteps, text, unconditional, scales)
            else:
                output = self._predict(scaled, timesteps, text)
            precise = at_least_float32(latents.dtype)
            latents = scheduler.step(output.to(precise), timestep, latents.to(precise)).prev_sample.to(latents.dtype)
        if until is not None and until < len(scheduler.timesteps):
            # Some samplers keep their latents in another scale than the U-Net's.
            latents = scheduler.scale_model_input(latents, scheduler.timesteps[until]).to(latents.dtype)
        return latents

    def make_scheduler(self, steps: int) -> Any:
        """A fresh sampler of ``steps`` steps on the model's own noise schedule, for predictions :meth:`as_trained`."""
        config = {key: value for key, value in self._scheduler_config.items() if key not in _SCHEDULER_ORIGIN}
        if self._reaches_pure_noise:
            # Not every sampler knows the rescaling, and those that do treat its last step differently.
            config |= {"trained_betas": betas_of(self.alphas_cumprod), "rescale_betas_zero_snr": False}
        told = "v_prediction" if self.prediction_type == "v_prediction" else "epsilon"
        options = {"prediction_type": told, **SCHEDULER_OPTIONS.get(self.scheduler_name, {})}
        scheduler = SCHEDULERS[self.scheduler_name].from_config(config, **options)  # type: ignore[attr-defined]
        scheduler.set_timesteps(steps)
        return scheduler

    def sampling_timesteps(self, steps: int) -> Tensor:
        """The sampler's timesteps in the order of sampling, int64 [steps] (PNDM repeats one)."""
        return self.make_scheduler(steps).timesteps.round().long()  # type: ignore[no-any-return]

    @torch.no_grad()
    def decode(self, latents: Tensor, *, batch_size: int = 64) -> Tensor:
        """Pictures of latents float [n, c, h, w]; uint8 [n, 3, H, W], on the CPU.

        Raises:
            NotFiniteError: The decoder gives infinite or NaN pixels.
        """
        pictures = [torch.empty((0, 3, *self.image_size), dtype=torch.uint8)]
        for start in range(0, len(latents), batch_size):
            chunk = latents[start : start + batch_size].to(self.vae.dtype)
            with self._using_vae():
                decoded = self.vae.decode(chunk / self.vae.config.scaling_factor).sample.float()
            require_finite(decoded, f"Pictures that the VAE of {self.name!r} decodes", self._vae_remedy)
            pictures.append(((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu())
        return torch.cat(pictures)

    @property
    def _text_encoders(self) -> tuple[Any, ...]:
        return (self.text_encoder,) if self.pair is None else self.pair.encoders

    def _using_vae(self) -> AbstractContextManager[None]:
        return visiting(self.vae, self.device) if self.offload else nullcontext()

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of a picture in pixels."""
        return self.latent_shape[1] * self._pixels_per_latent, self.latent_shape[2] * self._pixels_per_latent

    @property
    def _pixels_per_latent(self) -> int:
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def _multiple(self) -> int:
        """What a picture's edge must be a multiple of: the U-Net halves its latents at every level but the last."""
        return int(self._pixels_per_latent * 2 ** (len(self.unet.config.block_out_channels) - 1))

    @torch.no_grad()
    def encode_images(self, images: Tensor, *, batch_size: int = 64) -> Tensor:
        """Latents (posterior means, scaled) of uint8 images [n, 3, H, W]; float [n, c, h, w]."""
        latents = [self.initial_latents([])]
        for start in range(0, len(images), batch_size):
            pixels = images[start : start + batch_size].to(self.device).float() / 127.5 - 1
            with self._using_vae():
                mean = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mean
            latents.append((mean * self.vae.config.scaling_factor).to(self.device, self.dtype))
            require_finite(latents[-1], f"Latents that the VAE of {self.name!r} encodes pictures to", self._vae_remedy)
        return torch.cat(latents)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        steps: int,
        guidance: float | Sequence[float],
        batch_size: int = 64,
    ) -> Tensor:
        """Prompts to pictures: encode, sample, decode; uint8 [n, 3, H, W]."""
        if not prompts:
            return self.decode(self.initial_latents([]))
        text = self.encode_prompts(prompts, batch_size=batch_size)
        latents = self.sample(text, seeds=seeds, steps=steps, guidance=guidance, batch_size=batch_size)
        return self.decode(latents, batch_size=batch_size)

    def fingerprint(self) -> str:
        """SHA-256 over every weight of the U-Net, the text encoders and the VAE by name, and over added tokens."""
        digest = hashlib.sha256()
        for token, number in sorted(self.tokenizer.get_added_vocab().items()):
            if number >= self.tokenizer.vocab_size:
                digest.update(f"{token} {number}".encode())
        for part in (self.unet, *self._text_encoders, self.vae):
            for name, value in sorted(part.state_dict().items()):
                digest.update(name.encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @contextmanager
    def trainable(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Let gradients flow into ``parameters`` and nothing else, for the length of the context."""
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
                parameter.grad = None

    @property
    def _remedy(self) -> str:
        return overflow_remedy(
            self.autocast or self.dtype, "a weight of the model or of its edit is damaged or too large"
        )

    @property
    def _vae_remedy(self) -> str:
        return overflow_remedy(self.vae.dtype, "a weight of the VAE is damaged or too large")

    def _alphas(self, timesteps: Tensor, like: Tensor) -> Tensor:
        """Abar at timesteps, float [n, 1, 1, 1]; between two of them sigma = sqrt(1 / abar - 1) is linear.

        It is in float32 at least, as 1 - abar would be wrong in half precision.
        """
        alphas = self.alphas_cumprod.to(like.device, at_least_float32(like.dtype))
        low, high = timesteps.floor().long(), timesteps.ceil().long()
        found = alphas[low]
        if timesteps.is_floating_point():
            sigmas = ((1 - alphas) / alphas).sqrt()
            sigma = torch.lerp(sigmas[low], sigmas[high], (timesteps - low).to(alphas.dtype))
            found = torch.where(low == high, found, 1 / (1 + sigma.square()))
        return found.reshape(-1, 1, 1, 1)
