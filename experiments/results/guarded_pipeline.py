"""A pipeline of diffusers that keeps what an erased model has beside its weights, such as a guard of its sampling.

Load its folder with ``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)``; the weights alone, as other
tools may read them, are without the guard.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from torch import Tensor

from diffusion.guard import Guard
from erasure.addition import Addition

EDIT_FILE = "edit.safetensors"
"""What erasing changed and added, beside the pipeline's own files."""


class GuardedModel:
    """What additions ask of the model that they are put into; text is float [n, tokens, width].

    Args:
        pipeline: Whose parts it is.
        predict: The U-Net, as it is called by the pipeline.

    Attributes:
        guard: What stands before the model, if anything.
    """

    def __init__(self, pipeline: StableDiffusionPipeline, predict: Callable[..., Any]) -> None:
        self.name = "the pipeline"
        self.network = pipeline.unet
        self.text_encoder = pipeline.text_encoder
        self.tokenizer = pipeline.tokenizer
        self.device: torch.device = pipeline._execution_device
        self.dtype: torch.dtype = pipeline.unet.dtype
        self.guard: Guard | None = None
        self._scheduler = pipeline.scheduler
        self._predict = predict

    @property
    def denoiser(self) -> "GuardedModel":
        """What knows the layers of the network."""
        return self

    def text_attention(self) -> dict[str, Any]:
        """The cross-attention layers by name, in module order."""
        return {name: layer for name, layer in self.network.named_modules() if name.endswith(".attn2")}

    @property
    def vocabulary(self) -> Tensor:
        """The token embedding table, float [vocabulary, width]."""
        return self.text_encoder.get_input_embeddings().weight  # type: ignore[no-any-return]

    @property
    def max_tokens(self) -> int:
        """Positions of the text encoder."""
        return min(int(self.tokenizer.model_max_length), int(self.text_encoder.config.max_position_embeddings))

    @property
    def text_shape(self) -> tuple[int, int]:
        """Rows and width of a prompt's text embedding."""
        return self.max_tokens, self.vocabulary.shape[1]

    def require_one_text_encoder(self, what: str) -> None:
        """It has one."""

    def sampling_timesteps(self, steps: int) -> Tensor:
        """Those of a sampler of ``steps`` steps, int64 [steps]."""
        sampler = type(self._scheduler).from_config(self._scheduler.config)
        sampler.set_timesteps(steps)
        return sampler.timesteps.round().long()  # type: ignore[no-any-return]

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings as the guard reads them, or as they are if there is none."""
        padded = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        )
        ids = padded.input_ids.to(self.device)
        ends = (ids == self.tokenizer.eos_token_id).int().argmax(1)
        return (self.guard or Guard()).read(self.vocabulary[ids], ends, self._read)

    def _read(self, token_embeddings: Tensor, ends: Tensor) -> Tensor:
        ids = torch.zeros(token_embeddings.shape[:2], dtype=torch.int64, device=token_embeddings.device)
        ids.scatter_(1, ends[:, None], self.tokenizer.eos_token_id)
        # The encoder takes ids only; a hook on its table hands it our rows.
        hook = self.text_encoder.get_input_embeddings().register_forward_hook(lambda *_: token_embeddings)
        try:
            return self.text_encoder(ids).last_hidden_state.to(self.dtype)  # type: ignore[no-any-return]
        finally:
            hook.remove()

    def predict(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """The U-Net's noise prediction, float [n, c, h, w]."""
        text = (self.guard or Guard()).condition(text, timesteps)
        return self._predict(latents.to(self.dtype), timesteps, encoder_hidden_states=text, return_dict=False)[0]  # type: ignore[no-any-return]

    def noise_share(self, timesteps: Tensor) -> Tensor | float:
        """All of a difference of predictions, which are noise."""
        return 1.0

    def guided(
        self, latents: Tensor, timesteps: Tensor, text: Tensor, unconditional: Tensor, guidance: Tensor
    ) -> Tensor:
        """Classifier-free guidance, float [n, c, h, w]."""
        unconditional = (self.guard or Guard()).pair(unconditional.expand_as(text), text)
        both = torch.cat([unconditional, text])
        without, conditional = self.predict(latents.repeat(2, 1, 1, 1), timesteps.repeat(2), both).chunk(2)
        return without + guidance.reshape(-1, 1, 1, 1) * (conditional - without)


class GuardedPipeline(StableDiffusionPipeline):
    """Stable Diffusion's pipeline with the additions of :data:`EDIT_FILE`; it is called as that is."""

    kinds: ClassVar[Mapping[str, type[Addition]]] = {}

    _guarded: GuardedModel | None = None
    _read_once: list[Addition] | None = None

    @torch.no_grad()
    def __call__(self, prompt: Any = None, *given: Any, **named: Any) -> Any:
        """See diffusers.

        Raises:
            ValueError: Text is given as embeddings, which the guard could not have read, or a layer is to be skipped.
        """
        for refused in ("prompt_embeds", "negative_prompt_embeds", "clip_skip"):
            if named.get(refused) is not None:
                raise ValueError(f"{refused} goes past the guard of this pipeline; give the prompt as text.")
        with self._at_work():
            return super().__call__(prompt, *given, **named)

    def encode_prompt(
        self,
        prompt: Any,
        device: Any,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
        negative_prompt: Any = None,
        **named: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """See diffusers; text has the form that the guard gives it."""
        if self._guarded is None:
            raise ValueError("Only a call of the pipeline reads prompts with its guard; call it with the prompt.")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        against = [negative_prompt or ""] * len(prompts) if not isinstance(negative_prompt, list) else negative_prompt
        text = self._guarded.encode_prompts(prompts).repeat_interleave(num_images_per_prompt, dim=0)
        if not do_classifier_free_guidance:
            return text, None
        return text, self._guarded.encode_prompts(against).repeat_interleave(num_images_per_prompt, dim=0)

    @property
    def do_classifier_free_guidance(self) -> bool:
        """See diffusers; a guard may guide whatever the scale."""
        guard = self._guarded and self._guarded.guard
        return bool((guard and guard.always_guides) or super().do_classifier_free_guidance)

    def save_pretrained(self, save_directory: Any, *given: Any, **named: Any) -> None:
        """Refuse, as what is written would lack the guard."""
        raise ValueError(f"Copy the folder {self.name_or_path}; a pipeline that is saved anew would lack its guard.")

    def _additions(self) -> list[Addition]:
        if self._read_once is None:
            file = Path(self.name_or_path) / EDIT_FILE
            place = file if file.is_file() else Path(hf_hub_download(self.name_or_path, EDIT_FILE))
            self._read_once = read_additions(place, self.kinds)
        return self._read_once

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Let the additions act, for the length of one call."""
        unet, predict = self.unet, self.unet.forward
        # Hooks of others, such as those that move the U-Net to the GPU, may stand there already.
        replaced = unet.__dict__.get("forward")
        model = self._guarded = GuardedModel(self, predict)
        with ExitStack() as undone:
            undone.callback(setattr, self, "_guarded", None)
            for addition in self._additions():
                undone.callback(addition.attach(model))  # type: ignore[arg-type]
            undone.callback(setattr if replaced else delattr, unet, "forward", *([replaced] if replaced else []))
            unet.forward = self._forward(model)
            yield

    def _forward(self, model: GuardedModel) -> Callable[..., tuple[Tensor]]:
        """What the pipeline calls in the U-Net's place: both halves of its batch become the guided noise."""
        # A guidance may remember: each call has its own.
        guidance = (model.guard or Guard()).guidance(model)

        def forward(sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
            guided = self.do_classifier_free_guidance
            latents = sample.chunk(2)[0] if guided else sample
            timesteps = torch.as_tensor(timestep, device=sample.device).expand(len(latents))
            if not guided:
                return (model.predict(latents, timesteps, encoder_hidden_states),)
            unconditional, text = encoder_hidden_states.chunk(2)
            precise = torch.promote_types(latents.dtype, torch.float32)
            scales = torch.full((len(latents),), max(self.guidance_scale, 1.0), dtype=precise, device=latents.device)
            noise = guidance(latents, timesteps, text, unconditional, scales)
            # u + s (t - u) of two equal halves is that half.
            return (torch.cat([noise, noise]),)

        return forward


def read_additions(file: Path, kinds: Mapping[str, type[Addition]]) -> list[Addition]:
    """The additions of an edit's file."""
    with safe_open(file, "pt") as opened:
        described = json.loads(opened.metadata()["edit"])["additions"]
        found = []
        for place, addition in enumerate(described):
            own = f"+{place}:"
            tensors = {key.removeprefix(own): opened.get_tensor(key) for key in opened.keys() if key.startswith(own)}  # noqa: SIM118
            found.append(kinds[addition["kind"]].restored(addition["settings"], tensors))
        return found
