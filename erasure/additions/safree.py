"""SAFREE's filters: trigger tokens leave the concept's subspace, for as many steps as the prompt calls for."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional

from diffusion.guard import Encode, Guard, Guidance, Predictor
from diffusion.model import TextToImage
from erasure.addition import Addition, set_guard

Projection = Literal["prompt_last", "concept_last"]
"""A trigger e becomes P_m (I - P_c) e, within the prompt's own subspace; or (I - P_c) P_m e, off the concept's."""

ENCODED_AT_ONCE = 256
"""Masked prompts in one pass of the text encoder; it changes speed and memory only."""

STEP_UNIT = 2.0**-20
"""What stands for one sampler step in the last row of a filtered text: exact in every precision, and next to nothing
beside embeddings where texts are compared."""


@dataclass(frozen=True, eq=False)
class Filters(Addition):
    """What SAFREE adds to a model; :class:`erasure.erasers.safree.SAFREE` has the formulas.

    Attributes:
        basis: float [r, width], orthonormal, of the concept's subspace: P_c = basis^T basis.
        negative: float [tokens, width], what takes the empty prompt's place in guidance, if anything.
        negative_ends: Whether it does so no longer than the prompt is filtered.
        alpha: How far above the others' mean a trigger's distance is.
        slope: k.
        midpoint: t_0.
        most_steps: gamma; None to filter at every step.
        steps: Of the sampler in whose steps the filtering is counted.
        projection: In which order.
        skip_scales: s where the U-Net's upward path is widest, and where it is second widest; None for no latent
            re-attention.
    """

    kind: ClassVar[str] = "safree"
    is_guard: ClassVar[bool] = True

    basis: Tensor
    negative: Tensor | None
    negative_ends: bool
    alpha: float
    slope: float
    midpoint: float
    most_steps: int | None
    steps: int
    projection: Projection
    skip_scales: tuple[float, float] | None

    def settings(self) -> dict[str, Any]:
        """See :class:`erasure.addition.Addition`."""
        return {name: value for name, value in vars(self).items() if name not in {"basis", "negative"}}

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`erasure.addition.Addition`."""
        return {"basis": self.basis} | ({} if self.negative is None else {"negative": self.negative})

    @classmethod
    def restored(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """See :class:`erasure.addition.Addition`."""
        scales = settings["skip_scales"]
        named = {**settings, "skip_scales": None if scales is None else tuple(scales)}
        return cls(tensors["basis"], tensors.get("negative"), **named)

    def attach(self, model: TextToImage) -> Callable[[], None]:
        """See :class:`erasure.addition.Addition`."""
        model.require_one_text_encoder("SAFREE")
        width = model.vocabulary.shape[1]
        if self.basis.shape[1] != width:
            raise ValueError(
                f"The filters were made for text of width {self.basis.shape[1]} and that of {model.name!r} has "
                f"{width}; load the model that the edit was made from."
            )
        guard = FilteringGuard(self, model)
        take_away = set_guard(model, guard)
        widths = sorted(set(model.unet.config.block_out_channels), reverse=True)
        scales = dict(zip(widths, self.skip_scales or (), strict=False))
        hooks = [
            block.register_forward_pre_hook(guard.attenuator(scales), with_kwargs=True)
            for block in (model.unet.up_blocks if scales else ())
        ]

        def detach() -> None:
            take_away()
            for hook in hooks:
                hook.remove()

        return detach


class FilteringGuard(Guard):
    """Reads prompts with their triggers filtered, and gives the U-Net the filtered text for as long as it should.

    What :meth:`read` returns is [filtered; original; last filtered step], float [n, 2 * tokens + 1, width].

    Args:
        added: What it goes by.
        model: Which it stands before.
    """

    def __init__(self, added: Filters, model: TextToImage) -> None:
        self.added = added
        self.basis = added.basis.to(model.device, torch.float64)
        self.blank = model.vocabulary[0].detach()
        self.tokens = model.max_tokens
        # Up to its last step the filter acts from the noise on, and after the sampler's last there is nothing.
        timesteps = model.sampling_timesteps(added.steps)
        self.lowest = torch.cat([timesteps[:-1], timesteps.new_zeros(1)]).to(model.device)
        self.negative = None if added.negative is None else added.negative.to(model.device, model.dtype)
        self.always_guides = added.skip_scales is not None
        self.evaluations_per_step = 2 if added.skip_scales is None else 3
        self._attenuates = False

    def read(self, token_embeddings: Tensor, eos_positions: Tensor, encode: Encode) -> Tensor:
        """See :class:`diffusion.guard.Guard`."""
        text = encode(token_embeddings, eos_positions)
        places, ends = torch.arange(text.shape[1], device=text.device), eos_positions[:, None]
        own = (places > 0) & (places < ends)
        masked = self._masked_prompts(token_embeddings, eos_positions, own, encode)
        triggers = self._triggers(masked.detach(), own)
        projected = self._projected(text.double(), masked, 64 * torch.finfo(text.dtype).eps)
        filtered = torch.where(triggers[..., None], projected.to(text.dtype), text)
        similarity = functional.cosine_similarity(projected.detach(), text.detach().double(), dim=-1)
        last = self._last_step(similarity, places <= ends)
        row = (last * STEP_UNIT).to(text.dtype)[:, None, None].expand(-1, 1, text.shape[2])
        return torch.cat([filtered, text, row], dim=1)

    def pair(self, unconditional: Tensor, text: Tensor) -> Tensor:
        """See :class:`diffusion.guard.Guard`."""
        if self.negative is None:
            return unconditional
        negative = self.negative.expand_as(text[:, : self.tokens])
        after = unconditional[:, self.tokens : -1] if self.added.negative_ends else negative
        return torch.cat([negative, after, text[:, -1:]], dim=1)

    def condition(self, text: Tensor, timesteps: Tensor) -> Tensor:
        """See :class:`diffusion.guard.Guard`.

        Raises:
            ValueError: The text was encoded without this guard.
        """
        if text.shape[1] != 2 * self.tokens + 1:
            raise ValueError(
                f"The text has {text.shape[1]} rows and SAFREE's has {2 * self.tokens + 1}; encode prompts with the "
                "guarded model."
            )
        filtered, original, row = text.split([self.tokens, self.tokens, 1], dim=1)
        if self.added.most_steps is None:
            return filtered  # type: ignore[no-any-return]
        last = (row[:, 0, 0] / STEP_UNIT).round().long().clamp(max=len(self.lowest) - 1)
        return torch.where((timesteps.round() >= self.lowest[last])[:, None, None], filtered, original)

    def guidance(self, model: Predictor, steps: Iterable[int] | None = None) -> Guidance:
        """See :class:`diffusion.guard.Guard`; with latent re-attention, the original prompts are predicted beside."""
        if self.added.skip_scales is None:
            return model.guided_noise

        def guided(latents: Tensor, timesteps: Tensor, text: Tensor, unconditional: Tensor, scales: Tensor) -> Tensor:
            originals = torch.cat([text[:, self.tokens : -1]] * 2 + [text[:, -1:]], dim=1)
            texts = torch.cat([self.pair(unconditional.expand_as(text), text), text, originals])
            self._attenuates = True
            try:
                noise = model.predict_noise(latents.repeat(3, 1, 1, 1), timesteps.repeat(3), texts)
            finally:
                self._attenuates = False
            without, conditional, _ = noise.chunk(3)
            return without + scales.reshape(-1, 1, 1, 1) * (conditional - without)

        return guided

    def attenuator(self, scales: Mapping[int, float]) -> Callable[..., Any]:
        """A hook before a block of the U-Net's upward path that attenuates what the skip connections bring its layers.

        Args:
            scales: s by the number of channels that a layer adds the skip connection to; others are left alone.
        """

        def hook(block: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], Any] | None:
            if not self._attenuates:
                return None
            # Layers take skip connections from the last on.
            layers = block.resnets[:-1]
            widths = [named["hidden_states"].shape[1], *(layer.out_channels for layer in layers)]
            skips = tuple(
                attenuated(skip, scales[width]) if width in scales else skip
                for skip, width in zip(named["res_hidden_states_tuple"], reversed(widths), strict=True)
            )
            return arguments, {**named, "res_hidden_states_tuple": skips}

        return hook

    def _masked_prompts(self, token_embeddings: Tensor, ends: Tensor, own: Tensor, encode: Encode) -> Tensor:
        """The pooled embedding m_i of each prompt without its token i, float64 [n, tokens, width], 0 where none is.

        ``own`` is bool [n, tokens], where tokens of the prompts are.
        """
        owners, places = own.nonzero(as_tuple=True)
        # The encoder looks back only: what follows the end does not change what is there.
        length = int(ends.max()) + 1
        pooled = [torch.empty((0, token_embeddings.shape[2]), dtype=torch.float64, device=token_embeddings.device)]
        for start in range(0, len(owners), ENCODED_AT_ONCE):
            chosen = owners[start : start + ENCODED_AT_ONCE]
            copies = torch.arange(len(chosen), device=chosen.device)
            without = (copies, places[start : start + ENCODED_AT_ONCE])
            text = encode(token_embeddings[chosen, :length].index_put(without, self.blank), ends[chosen])
            pooled.append(text[copies, ends[chosen]].double())
        nothing = token_embeddings.new_zeros(token_embeddings.shape, dtype=torch.float64)
        return nothing.index_put((owners, places), torch.cat(pooled))

    def _triggers(self, masked: Tensor, own: Tensor) -> Tensor:
        """Which tokens are triggers, bool [n, tokens]: || (I - P_c) m_i || >= (1 + alpha) times the others' mean."""
        distances = self._off_concept(masked).norm(dim=-1)
        count = own.sum(dim=1, keepdim=True)
        others = (distances.sum(dim=1, keepdim=True) - distances) / (count - 1).clamp(min=1)
        return own & (distances >= (1 + self.added.alpha) * others)  # type: ignore[no-any-return]

    def _projected(self, text: Tensor, masked: Tensor, tolerance: float) -> Tensor:
        """What every embedding of ``text`` float64 [n, tokens, width] becomes if it is a trigger's."""

        def on_prompt(vectors: Tensor) -> Tensor:
            inverse = torch.linalg.pinv(masked, rtol=tolerance)
            return vectors @ masked.mT @ inverse.mT  # type: ignore[no-any-return]

        if self.added.projection == "prompt_last":
            return on_prompt(self._off_concept(text))
        return self._off_concept(on_prompt(text))

    def _off_concept(self, vectors: Tensor) -> Tensor:
        """(I - P_c) of float64 [..., width]."""
        return vectors - vectors @ self.basis.T @ self.basis

    def _last_step(self, similarity: Tensor, active: Tensor) -> Tensor:
        """round(gamma sigmoid(2 k (10 beta - t_0))), beta = 1 - mean cosine over the active positions; float64 [n]."""
        added = self.added
        beta = 1 - (similarity * active).sum(dim=1) / active.sum(dim=1)
        return ((added.most_steps or 0) * torch.sigmoid(2 * added.slope * (10 * beta - added.midpoint))).round()


def attenuated(skip: Tensor, scale: float) -> Tensor:
    """Scale down what the filtered prompts have more of than the original ones among the lowest frequencies.

    Args:
        skip: float [3 n, c, h, w], of the unconditional half, of the filtered prompts and of the original ones.
        scale: s; a frequency F becomes s F where it is greater than the original's, in its real part.

    Returns:
        float [3 n, c, h, w], the second third changed.
    """
    precise = skip.to(torch.promote_types(skip.dtype, torch.float32))
    unconditional, filtered, original = precise.chunk(3)
    spectrum, reference = (torch.fft.fftshift(torch.fft.fft2(part), dim=(-2, -1)) for part in (filtered, original))
    rows, columns = (slice(size // 2 - 1, size // 2 + 1) for size in skip.shape[-2:])
    greater = torch.zeros(spectrum.shape, dtype=torch.bool, device=skip.device)
    greater[..., rows, columns] = (spectrum.real > reference.real)[..., rows, columns]
    lowered = torch.fft.ifft2(torch.fft.ifftshift(torch.where(greater, scale * spectrum, spectrum), dim=(-2, -1))).real
    return torch.cat([unconditional, lowered, original]).to(skip.dtype)
