"""Safe guidance: a third prediction, of what is unwanted, takes its direction out of every sampler step."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from diffusion.guard import Guard, Guidance, Predictor
from diffusion.model import TextToImage
from erasure.addition import Addition, set_guard

Scaling = Literal["at_most_1", "at_least_1"]
"""Which of |phi| and 1 weighs the safety term: the lesser, as the authors' code has it, or the greater."""


@dataclass(frozen=True, eq=False)
class SafeGuidance(Addition):
    """What Safe Latent Diffusion adds to a model; :class:`erasure.erasers.sld.SLD` has the formula.

    Attributes:
        concept: float [tokens, width], the embedding of c_S.
        safety_scale: s_S.
        threshold: lambda.
        warmup_steps: delta.
        momentum_scale: s_m.
        momentum_beta: beta_m.
        scaling: How |phi| is bounded.
    """

    kind: ClassVar[str] = "safe_guidance"
    is_guard: ClassVar[bool] = True

    concept: Tensor
    safety_scale: float
    threshold: float
    warmup_steps: int
    momentum_scale: float
    momentum_beta: float
    scaling: Scaling

    def settings(self) -> dict[str, Any]:
        """See :class:`erasure.addition.Addition`."""
        return {name: value for name, value in vars(self).items() if name != "concept"}

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`erasure.addition.Addition`."""
        return {"concept": self.concept}

    @classmethod
    def restored(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """See :class:`erasure.addition.Addition`."""
        return cls(tensors["concept"], **settings)

    def attach(self, model: TextToImage) -> Callable[[], None]:
        """See :class:`erasure.addition.Addition`."""
        expected = model.text_shape
        if tuple(self.concept.shape) != expected:
            raise ValueError(
                f"The safe guidance was made for text of shape {list(self.concept.shape)} and {model.name!r} has "
                f"{list(expected)}; load the model that the edit was made from."
            )
        return set_guard(model, SafetyGuard(self))


class SafetyGuard(Guard):
    """Guides every picture away from the concept, whatever its guidance scale.

    Args:
        added: What it goes by.
    """

    evaluations_per_step = 3
    always_guides = True

    def __init__(self, added: SafeGuidance) -> None:
        self.added = added

    def guidance(self, model: Predictor, steps: Iterable[int] | None = None) -> Guidance:
        """See :class:`diffusion.guard.Guard`; it remembers the momentum and counts the steps."""
        added = self.added
        concept = added.concept.to(model.device, model.dtype)
        momentum: Tensor | float = 0.0
        turns = count() if steps is None else iter(steps)

        def guided(latents: Tensor, timesteps: Tensor, text: Tensor, unconditional: Tensor, scales: Tensor) -> Tensor:
            nonlocal momentum
            texts = torch.cat([unconditional.expand_as(text), text, concept.expand_as(text)])
            noise = model.predict(latents.repeat(3, 1, 1, 1), timesteps.repeat(3), texts)
            # |phi| may be too large for half precision.
            plain, prompted, unsafe = noise.to(torch.promote_types(noise.dtype, torch.float32)).chunk(3)
            difference = model.noise_share(timesteps) * (prompted - unsafe)
            size = (added.safety_scale * difference).abs()
            bounded = size.clamp(max=1) if added.scaling == "at_most_1" else size.clamp(min=1)
            weight = torch.where(difference < added.threshold, bounded, 0)
            safety = weight * (unsafe - plain) + added.momentum_scale * momentum
            momentum = added.momentum_beta * momentum + (1 - added.momentum_beta) * safety
            direction = prompted - plain
            if next(turns) >= added.warmup_steps:
                direction = direction - safety
            return (plain + scales.reshape(-1, 1, 1, 1) * direction).to(latents.dtype)

        return guided
