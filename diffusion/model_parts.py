"""What a model consists of: network, noise process, text encoders and autoencoder, taken from a diffusers pipeline."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion.architectures import Pipeline, architecture_of
from diffusion.autoencoder import Autoencoder
from diffusion.processes.protocol import NoiseProcess
from diffusion.text.tokenizer import CleaningTokenizer


class ModelParts:
    """What a diffusion model consists of, whatever its architecture.

    Args:
        pipeline: A loaded diffusers pipeline; its parts are used, not copied.
        name: What results call the model.
        scheduler: One of the samplers that its noise process knows; None for the first.
        resolution: Edge of a square picture in pixels, or width and height; the network's own if None.
        offload: The VAE, and a T5, wait on the CPU while they are not used.
        t5_tokens: How much of a prompt a T5 reads, in its tokens, where the architecture has one.

    Attributes:
        denoiser: The network.
        process: The noise process.
        text_encoders: What reads prompts.
        autoencoder: What is between latents and pictures.
        scheduler_name: The sampler.

    Raises:
        ValueError: Unknown scheduler, a resolution that the model cannot have, tokenizers that differ, or a network
            that takes more than latents.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        name: str,
        scheduler: str | None,
        resolution: int | tuple[int, int] | None,
        offload: bool,
        t5_tokens: int,
    ) -> None:
        self.name = name
        self.resolution = resolution
        network = pipeline.components.get("transformer") or pipeline.components["unet"]
        home = next(network.parameters()).device if offload else None
        architecture = architecture_of(pipeline, name, t5_tokens=t5_tokens, offload_to=home)
        self.denoiser = architecture.denoiser
        self.text_encoders = architecture.text_encoders
        self._assemble = architecture.assemble
        for part in (*self.text_encoders.all_encoders, self.network, pipeline.vae):
            part.eval().requires_grad_(False)
        vae = pipeline.vae
        if architecture.vae_overflows and vae.config.force_upcast and vae.dtype == torch.float16:
            # SDXL's own VAE overflows there; those of Stable Diffusion 1 and 2 have the flag by default and do not.
            vae.to(torch.float32)
        self.autoencoder = Autoencoder(vae, name, offload=offload)
        self._check_latents()
        _, height, width = self.latent_shape
        self.process: NoiseProcess = architecture.process(self.denoiser.tokens(height, width))
        scheduler = self.process.samplers[0] if scheduler is None else scheduler
        if scheduler not in self.process.samplers:
            raise ValueError(
                f"scheduler is {scheduler!r}; it must be one of {', '.join(self.process.samplers)} for {name!r}, which "
                f"predicts {self.process.currency}."
            )
        self.scheduler_name = scheduler

    def _check_latents(self) -> None:
        """Refuse a network that takes more than latents, and pictures of a size that it does not take.

        Raises:
            ValueError: See above.
        """
        if (channels := self.denoiser.channels) != (latent_channels := self.autoencoder.channels):
            raise ValueError(
                f"The {self.denoiser.kind} of {self.name!r} takes {channels} channels and the latents of its VAE have "
                f"{latent_channels}; models of inpainting (9), editing (8) and depth (5) draw from more than a text "
                "and cannot be used: choose a text-to-image model."
            )
        resolution = self.resolution
        edges = () if resolution is None else (resolution,) if isinstance(resolution, int) else resolution
        pixels = self.autoencoder.pixels_per_latent
        multiple, largest = pixels * self.denoiser.multiple, self.denoiser.largest
        shown = resolution if isinstance(resolution, int) else list(edges)
        if any(edge < multiple or edge % multiple for edge in edges):
            raise ValueError(f"resolution is {shown}; {self.name!r} takes a multiple of {multiple} pixels.")
        if largest is not None and any(edge > pixels * largest for edge in edges):
            raise ValueError(f"resolution is {shown}; {self.name!r} takes {pixels * largest} pixels at most.")

    @property
    def network(self) -> Any:
        """The denoiser's network, a module of diffusers."""
        return self.denoiser.network

    @property
    def vae(self) -> Any:
        """The autoencoder's network."""
        return self.autoencoder.vae

    @property
    def text_encoder(self) -> Any:
        """The first text encoder."""
        return self.text_encoders.encoders[0]

    @property
    def tokenizer(self) -> CleaningTokenizer:
        """The tokenizer whose ids the text encoders read."""
        return self.text_encoders.tokenizer

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        return next(self._weights).device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the network's weights."""
        return next(weight.dtype for weight in self._weights if weight.is_floating_point())

    @property
    def _weights(self) -> Iterator[Tensor]:
        """The network's; diffusers looks through all of its modules for hooks each time that it is asked for one.

        That is a tenth of a step of a small U-Net, and on a GPU time in which nothing new is queued.
        """
        return self.network.parameters()  # type: ignore[no-any-return]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one picture's latents."""
        if self.resolution is None:
            height, width = self.denoiser.size
        else:
            pixels = (self.resolution, self.resolution) if isinstance(self.resolution, int) else self.resolution
            width, height = (edge // self.autoencoder.pixels_per_latent for edge in pixels)
        return self.denoiser.channels, height, width

    @property
    def training_timesteps(self) -> int:
        """Number of timesteps of the noise process (1000 for Stable Diffusion)."""
        return self.process.length

    def noise_share(self, timesteps: Tensor) -> Tensor | float:
        """What of a difference of predictions is a difference of noise: a number, or [n, 1, 1, 1]."""
        return self.process.noise_share(timesteps)

    @property
    def vocabulary(self) -> Tensor:
        """The token embedding table, float [vocabulary, width]; of several text encoders side by side."""
        return self.text_encoders.vocabulary

    def token_embeddings(self, ids: Tensor) -> Tensor:
        """Rows of :attr:`vocabulary`, int64 [...] to float [..., width]."""
        return self.text_encoders.look_up(ids)

    @property
    def text_shape(self) -> tuple[int, int]:
        """Rows and width of one prompt's text embedding."""
        return self.text_encoders.shape

    @property
    def max_tokens(self) -> int:
        """Positions of the text encoder, start and end tokens included."""
        return self.text_encoders.max_tokens

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of a picture in pixels."""
        pixels = self.autoencoder.pixels_per_latent
        return self.latent_shape[1] * pixels, self.latent_shape[2] * pixels

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

    def fingerprint(self) -> str:
        """SHA-256 over every weight of the network, the text encoders and the VAE by name, and over added tokens."""
        digest = hashlib.sha256()
        for token, number in sorted(self.tokenizer.get_added_vocab().items()):
            if number >= self.tokenizer.vocab_size:
                digest.update(f"{token} {number}".encode())
        for part in (self.network, *self.text_encoders.all_encoders, self.vae):
            for name, value in sorted(part.state_dict().items()):
                digest.update(name.encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def as_pipeline(self) -> Pipeline:
        """A plain pipeline of diffusers with the model's parts as they are, and its sampler."""
        sampler = self.process.plain_sampler(self.scheduler_name)
        parts = {self.denoiser.part: self.network, "vae": self.vae, "scheduler": sampler}
        return self._assemble(**parts, **self.text_encoders.parts)
