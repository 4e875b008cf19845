"""A text-to-image diffusion model behind one small interface, whatever its size and origin."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.architectures import Pipeline
from diffusion.finite import overflow_remedy, require_finite
from diffusion.guard import Guard, Guidance
from diffusion.model_parts import ModelParts
from diffusion.precision import at_least_float32
from diffusion.text.encoders import Beside

UNGUIDED = 1.0
"""The guidance scale at which a picture is the prompt's alone. Lower ones mean the same, as in diffusers: the formula
of guidance would lead to the empty prompt at 0."""


def is_guided(guidance: float) -> bool:
    """Whether pictures of this guidance scale need the empty prompt beside their own."""
    return guidance > UNGUIDED


class TextToImage(ModelParts):
    """A diffusion model's parts with an exact count of what they cost, whatever its architecture.

    Text embeddings are float [n, tokens, width], with more rows than tokens where the network takes more, see
    :class:`diffusion.text.encoders.TextEncoders`; latents are float [n, c, h, w] in the network's scale; timesteps and
    what is predicted are those of its noise process, see :class:`diffusion.processes.protocol.NoiseProcess`; images are
    uint8 [n, 3, H, W].

    Args:
        pipeline: A loaded diffusers pipeline; its parts are used, not copied.
        name: What results call the model.
        scheduler: One of the samplers that its noise process knows; None for the first.
        autocast: Precision of the network's arithmetic when it differs from that of the weights.
        resolution: Edge of a square picture in pixels, or width and height; the network's own if None.
        offload: The VAE, and a T5, wait on the CPU while they are not used.
        t5_tokens: How much of a prompt a T5 reads, in its tokens, where the architecture has one.

    Attributes:
        unet_evaluations: Samples that went through the network's forward pass since the model was made. A guided step
            of one picture counts two; a batch of eight, unguided, counts eight.
        unet_gradients: Samples whose gradient went back through the network, which costs about two evaluations each and
            is counted apart from them.
        text_encodings: Texts that went through the text encoder (of several, through all at once).
        guard: A defence at inference, if one stands before the model.

    Raises:
        ValueError: See :class:`diffusion.model_parts.ModelParts`.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        name: str = "pipeline",
        scheduler: str | None = None,
        autocast: torch.dtype | None = None,
        resolution: int | tuple[int, int] | None = None,
        offload: bool = False,
        t5_tokens: int = 256,
    ) -> None:
        super().__init__(
            pipeline, name=name, scheduler=scheduler, resolution=resolution, offload=offload, t5_tokens=t5_tokens
        )
        self.autocast = autocast
        self.unet_evaluations = 0
        self.unet_gradients = 0
        self.text_encodings = 0
        self.guard: Guard | None = None

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
        return self._encode(self.tokenize(prompts), prompts)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], *, batch_size: int = 256) -> Tensor:
        """Text embeddings of any number of prompts without gradients, float [n, tokens, width]."""
        starts = range(0, len(prompts), batch_size)
        text = torch.cat([self.encode(prompts[start : start + batch_size]) for start in starts])
        require_finite(text, f"Text embeddings of {self.name!r}", self._remedy)
        return text

    def encode_tokens(self, prompts: Sequence[str]) -> Tensor:
        """Of :meth:`encode_prompts` the rows that cross-attention sees, float [n, max_tokens, width]."""
        return self.text_encoders.readable(self.encode_prompts(prompts))

    def require_one_text_encoder(self, what: str) -> None:
        """Refuse a method that knows of no second text encoder.

        Args:
            what: The method, as the start of a sentence.

        Raises:
            ValueError: The model has several.
        """
        if (count := len(self.text_encoders.all_encoders)) > 1:
            raise ValueError(
                f"{what} works with one text encoder and {self.name!r} has {'two' if count == 2 else count}; choose "
                "another method, or a model of Stable Diffusion 1 or 2."
            )

    def encode_ids(self, ids: Tensor) -> Tensor:
        """Text embeddings of token ids int64 [n, tokens]; float [n, tokens, width]."""
        return self._encode(ids, None)

    def _encode(self, ids: Tensor, prompts: Sequence[str] | None) -> Tensor:
        ids = ids.to(self.text_encoder.device)
        if self.guard is None:
            self.text_encodings += len(ids)
            return self.text_encoders.read_ids(ids, prompts).to(self.dtype)
        ends, unknown = self.text_encoders.ends(ids), prompts is None and self.text_encoders.reads_text
        beside = self.text_encoders.spelled(ids, ends) if unknown else prompts
        return self.encode_embeddings(self.token_embeddings(ids), ends, beside)

    def encode_embeddings(self, token_embeddings: Tensor, ends: Tensor, beside: Beside | None = None) -> Tensor:
        """Text embeddings of token embeddings, differentiable in them; float [n, tokens, width].

        Args:
            token_embeddings: float [n, tokens, width], what the embedding table would return (no positions added).
            ends: int64 [n], where each sequence ends.
            beside: What a T5 reads beside it.
        """

        def read(token_embeddings: Tensor, ends: Tensor) -> Tensor:
            self.text_encodings += len(token_embeddings)
            return self.text_encoders.read_embeddings(token_embeddings, ends, beside).to(self.dtype)

        return (self.guard or Guard()).read(token_embeddings, ends, read)

    def predict(self, latents: Tensor, timesteps: Tensor | float, text: Tensor) -> Tensor:
        """The network's prediction in the currency of the noise process, float [n, c, h, w].

        Args:
            latents: float [n, c, h, w].
            timesteps: One for all or [n].
            text: float [n, tokens, width].
        """
        timesteps = torch.as_tensor(timesteps, device=latents.device).expand(len(latents))
        return self.process.prediction(self._predict(latents, timesteps, text), latents, timesteps)

    def as_told(self, prediction: Tensor, latents: Tensor, timesteps: Tensor | float) -> Tensor:
        """What the samplers are to be told where this is predicted.

        Args:
            prediction: float [n, c, h, w], a prediction, or several weighted by numbers that sum to 1.
            latents: float [n, c, h, w], what it is predicted of.
            timesteps: One for all or [n].
        """
        timesteps = torch.as_tensor(timesteps, device=latents.device).expand(len(latents))
        return self.process.as_told(prediction, latents, timesteps)

    def _predict(self, latents: Tensor, timesteps: Tensor, text: Tensor, embedded: Tensor | None = None) -> Tensor:
        """What the samplers are told, float [n, c, h, w]; ``embedded`` are scales of embedded guidance, float [n]."""
        embedded = latents.new_ones(len(latents)) if embedded is None else embedded
        self.unet_evaluations += len(latents)
        if self.guard is not None:
            text = self.guard.condition(text, timesteps)
        rows, pooled = self.text_encoders.split(text)
        with torch.autocast(latents.device.type, self.autocast, enabled=self.autocast is not None):
            output = self.denoiser.evaluate(latents.to(self.dtype), timesteps, rows, pooled, embedded)
        if output.requires_grad:
            output.register_hook(self._count_gradients)
        return self.process.told(output, latents, timesteps)

    def _count_gradients(self, gradient: Tensor) -> None:
        self.unet_gradients += len(gradient)

    def guided(
        self, latents: Tensor, timesteps: Tensor | float, text: Tensor, unconditional: Tensor, guidance: float | Tensor
    ) -> Tensor:
        """Classifier-free guidance, both halves in one batch: p_0 + guidance * (p_c - p_0) of predictions p.

        Args:
            latents: float [n, c, h, w].
            timesteps: One for all or int64 [n].
            text: float [n, tokens, width].
            unconditional: float [tokens, width] or [n, tokens, width], the empty prompt's embedding.
            guidance: One for all or float [n].
        """
        return self._guided(self.predict, latents, timesteps, text, unconditional, guidance)

    def _guided(
        self,
        predict: Callable[[Tensor, Tensor, Tensor], Tensor],
        latents: Tensor,
        timesteps: Tensor | float,
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
        return self.guided if self.guard is None else self.guard.guidance(self, steps)

    def is_guided(self, guidance: float) -> bool:
        """Whether a picture of this guidance scale needs more than the prediction for its prompt."""
        if self.guard is not None and self.guard.always_guides:
            return True
        return self.denoiser.guidance == "classifier_free" and is_guided(guidance)

    def evaluations_per_step(self, guidance: float) -> int:
        """U-Net evaluations of one picture's sampler step at this guidance scale."""
        if not self.is_guided(guidance):
            return 1
        return 2 if self.guard is None else self.guard.evaluations_per_step

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor | float) -> Tensor:
        """Latents with unit Gaussian noise as they are at timesteps, float [n, c, h, w]."""
        timesteps = torch.as_tensor(timesteps, device=latents.device).expand(len(latents))
        return self.process.noised(latents, noise, timesteps)

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
            ValueError: Numbers of texts, seeds and guidance scales differ, or the network takes no guidance.
            NotFiniteError: The latents are infinite or NaN.
        """
        scales = torch.full((len(text),), guidance) if isinstance(guidance, (int, float)) else torch.tensor(guidance)
        if not len(text) == len(seeds) == len(scales):
            raise ValueError(f"{len(text)} texts, {len(seeds)} seeds and {len(scales)} guidance scales do not match.")
        scales = scales.clamp(min=UNGUIDED)
        if self.denoiser.guidance == "none" and bool((scales > UNGUIDED).any()):
            raise ValueError(
                f"guidance is {float(scales.max()):g}; {self.name!r} is distilled and takes none: give its prompts a "
                "guidance of 1 (prompt_set.columns.evaluation_guidance=null prompt_set.guidance=1)."
            )
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
        # A guard's own guidance thinks in the currency of the process.
        guidance = self.guidance() if self.guard is not None and self.guard.always_guides else None
        for timestep in scheduler.timesteps[start:until]:
            scaled = scheduler.scale_model_input(latents, timestep).to(latents.dtype)
            timesteps = timestep.to(self.device).expand(len(scaled))
            if guidance is not None:
                output = self.as_told(guidance(scaled, timesteps, text, unconditional, scales), scaled, timesteps)
            elif guided:
                output = self._guided(self._predict, scaled, timesteps, text, unconditional, scales)
            else:
                output = self._predict(scaled, timesteps, text, scales)
            precise = at_least_float32(latents.dtype)
            latents = scheduler.step(output.to(precise), timestep, latents.to(precise)).prev_sample.to(latents.dtype)
        if until is not None and until < len(scheduler.timesteps):
            # Some samplers keep their latents in another scale than the U-Net's.
            latents = scheduler.scale_model_input(latents, scheduler.timesteps[until]).to(latents.dtype)
        return latents

    def make_scheduler(self, steps: int) -> Any:
        """A fresh sampler of ``steps`` steps on the model's own noise process, for predictions :meth:`as_told`."""
        return self.process.sampler(self.scheduler_name, steps)

    def sampling_timesteps(self, steps: int) -> Tensor:
        """The sampler's timesteps in the order of sampling, [steps] (PNDM repeats one)."""
        return self.process.sampled_at(self.scheduler_name, steps)

    @torch.no_grad()
    def decode(self, latents: Tensor, *, batch_size: int = 64) -> Tensor:
        """Pictures of latents float [n, c, h, w]; uint8 [n, 3, H, W], on the CPU.

        Raises:
            NotFiniteError: The decoder gives infinite or NaN pixels.
        """
        pictures = [torch.empty((0, 3, *self.image_size), dtype=torch.uint8)]
        pictures += [self.autoencoder.decode(chunk, self.device) for chunk in latents.split(batch_size) if len(chunk)]
        return torch.cat(pictures)

    @torch.no_grad()
    def encode_images(self, images: Tensor, *, batch_size: int = 64) -> Tensor:
        """Latents (posterior means, scaled) of uint8 images [n, 3, H, W]; float [n, c, h, w].

        Raises:
            NotFiniteError: The encoder gives infinite or NaN latents.
        """
        chunks = [chunk for chunk in images.split(batch_size) if len(chunk)]
        latents = [self.autoencoder.encode(chunk, self.device, self.dtype) for chunk in chunks]
        return torch.cat([self.initial_latents([]), *latents])

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
