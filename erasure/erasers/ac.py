"""AC: make the concept's prompts predict what their anchor's predict."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from diffusion.checked import checked
from diffusion.model import TextToImage
from diffusion.streams import derived_seed, stream
from erasure.concept import Concept
from erasure.finetuning import FineTuning, Trained, noise_error, retaining
from erasure.parameters import UNetScope
from erasure.pictures import Painting, Pictures, paint
from erasure.protocols import Objective
from erasure.trajectories import Trajectories


@checked
class AC(Trained):
    """Concept ablation (Kumari et al., "Ablating Concepts in Text-to-Image Diffusion Models", ICCV 2023).

    L = || eps_theta(x_t, c*, t) - sg[eps_theta(x_t, c, t)] ||^2 (mean), their model-based variant: c* names the
    target, c the anchor in the same template, x_t is a noised picture that the model made of c, t is uniform, and sg
    stops the gradient of the current model's own prediction. Their noise-based variant predicts the noise in x_t
    instead: || eps_theta(x_t, c*, t) - eps ||^2. With prior preservation, lambda || eps_theta(x_t', c', t') - eps' ||^2
    is added, x_t' another noised picture and c' what it was made of. Several concepts take turns, each with pictures
    of its own anchor. The defaults are the authors', on one GPU, in the terms of these formulas: their code divides the
    first term, a sum over four channels, by a mask of one, so that it counts four times as much as a mean beside the
    prior term and the norm that gradients are clipped to.

    Attributes:
        scope: What is trained. ``token_embedding`` is the embeddings of tokens that the concept's target prompts alone
            have, none of which any anchor or preserved prompt has; pruning that names no scope then acts on
            ``xattn_kv``.
        variant: ``model`` or ``noise``.
        steps: Optimiser steps (AdamW).
        learning_rate: AdamW's.
        batch_size: Noised pictures per step; several targets take turns.
        images: Pictures of the anchor, made once; the concept's templates take turns.
        sampling_steps: Sampler steps of a picture, and of the retain term's trajectories.
        image_guidance: Guidance scale of a picture.
        weight_decay: AdamW's.
        clip_norm: Largest norm of the gradient.
        prior_weight: lambda.
        detach_first_token: Keys and values of the first token get no gradient, as in the authors' code.
        retain_weight: Weight of the retain term on the concept's preserved phrases; 0 for none.
        retain_trajectories: Of the retain term; see :class:`erasure.trajectories.Trajectories`.
        sampling_batch_size: Pictures sampled at a time; it changes speed and memory only.
        cache: Folder that keeps the anchor's pictures for every concept that has this anchor in these templates; it
            changes speed only: their cost is counted all the same.
    """

    scope: UNetScope | Literal["token_embedding"] = "xattn_kv"
    variant: Literal["model", "noise"] = "model"
    steps: Annotated[int, Field(ge=1)] = 200
    learning_rate: Annotated[float, Field(gt=0)] = 8e-6
    batch_size: Annotated[int, Field(ge=1)] = 4
    images: Annotated[int, Field(ge=1)] = 1000
    sampling_steps: Annotated[int, Field(ge=1, le=1000)] = 25
    image_guidance: Annotated[float, Field(ge=0)] = 6.0
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    clip_norm: Annotated[float, Field(gt=0)] | None = 0.25
    prior_weight: Annotated[float, Field(ge=0)] = 0.0
    detach_first_token: bool = True
    retain_weight: Annotated[float, Field(ge=0)] = 0.0
    retain_trajectories: Annotated[int, Field(ge=1)] | None = None
    sampling_batch_size: Annotated[int, Field(ge=1)] = 64
    cache: Path | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("prior_weight", "retain_weight"):
            if self.scope == "token_embedding" and getattr(self, name):
                raise ValueError(
                    f"{name} is {getattr(self, name)} and scope 'token_embedding', which leaves every prompt but the "
                    f"target's as it is; set {name}=0 or choose another scope."
                )
        return self

    def objective(self) -> Objective:
        """The loss, with the retain term if it has weight."""
        trajectories = Trajectories(
            self.sampling_steps, self.image_guidance, self.retain_trajectories, self.sampling_batch_size
        )
        return retaining(ACObjective(self), self.retain_weight, trajectories, self.batch_size)

    def training(self, model: TextToImage, concept: Concept) -> FineTuning:
        """See :class:`erasure.finetuning.Trained`."""
        if self.scope == "token_embedding":
            model.require_one_text_encoder("Scope 'token_embedding'")
        rows = target_token_rows(model, concept) if self.scope == "token_embedding" else None
        scope = "xattn_kv" if self.scope == "token_embedding" else self.scope
        return FineTuning(scope, self.steps, self.learning_rate, self.weight_decay, self.clip_norm, rows)


class ACObjective:
    """The loss of :class:`AC` and the anchors' pictures that it needs."""

    def __init__(self, config: AC) -> None:
        self._config = config

    def prepare(
        self, model: TextToImage, concept: Concept, *, scope: UNetScope, steps: int, seed: int, checkpoint: Path | None
    ) -> int:
        """See :class:`erasure.protocols.Objective`."""
        config = self._config
        self._seed = seed
        painting = Painting(
            config.images, config.sampling_steps, config.image_guidance, config.sampling_batch_size, config.cache
        )
        painted: dict[tuple[str, ...], Pictures] = {}
        anchors, latents, prompts, spent, rows_before = [], [], [], 0, 0
        for part in concept.parts:
            anchor = tuple(part.anchor_prompts)
            text = model.encode_prompts(anchor)
            if anchor not in painted:
                painted[anchor], cost = paint(
                    model,
                    anchor,
                    text,
                    painting,
                    seed=derived_seed(seed, "ac/pictures", *anchor),
                    part=f"anchors-{len(painted)}",
                    checkpoint=checkpoint,
                )
                spent += cost
            latents.append(painted[anchor].latents)
            prompts.append(painted[anchor].prompts + rows_before)
            anchors.append(text)
            rows_before += len(text)
        self._anchors = torch.cat(anchors)
        self._pictures = Pictures(torch.cat(latents), torch.cat(prompts))
        self._target_ids = model.tokenize(concept.target_prompts)
        self._targets = model.encode_prompts(concept.target_prompts)
        self._phrases = torch.tensor([len(part.targets) for part in concept.parts])
        self._templates = torch.tensor([len(part.templates) for part in concept.parts])
        sizes = self._phrases * self._templates
        self._first_targets = sizes.cumsum(0) - sizes
        return spent

    def loss(self, model: TextToImage, step: int) -> Tensor:
        """See :class:`erasure.protocols.Objective`."""
        config = self._config
        generator = stream(self._seed, "ac/training", step)
        places = torch.arange(step * config.batch_size, (step + 1) * config.batch_size)
        picks = torch.randint(config.images, (config.batch_size,), generator=generator)
        parts, rounds = places % len(self._phrases), places // len(self._phrases)
        batch = self._pictures.noised(model, picks + parts * config.images, generator)
        # Each concept's phrases take turns, in the template that the picture was made in.
        phrases, templates = rounds % self._phrases[parts], picks % self._templates[parts]
        rows = self._first_targets[parts] + phrases * self._templates[parts] + templates
        learns_text = config.scope == "token_embedding"
        text = model.encode_ids(self._target_ids[rows]) if learns_text else self._targets[rows]
        with first_token_detached(model, enabled=config.detach_first_token):
            if config.variant == "noise":
                wanted = batch.noise
            else:
                with torch.no_grad():
                    wanted = model.predict_noise(batch.latents, batch.timesteps, self._anchors[batch.prompts])
            loss = noise_error(model, batch.latents, batch.timesteps, text, wanted.to(batch.latents.dtype))
            if not config.prior_weight:
                return loss
            others = torch.randint(len(self._pictures.latents), (config.batch_size,), generator=generator)
            prior = self._pictures.noised(model, others, generator)
            text = self._anchors[prior.prompts]
            return loss + config.prior_weight * noise_error(model, prior.latents, prior.timesteps, text, prior.noise)


def target_token_rows(model: TextToImage, concept: Concept) -> Tensor:
    """Tokens that the concept's target prompts have and none of its anchor and preserved prompts has, int64 [k].

    Raises:
        ValueError: There are none.
    """
    others = ["", *concept.anchor_prompts, *concept.preserved_prompts]
    targets, kept = (set(model.tokenize(prompts).flatten().tolist()) for prompts in (concept.target_prompts, others))
    if not targets - kept:
        raise ValueError(
            f"scope is 'token_embedding' and every token of concept {concept.name!r}'s targets is in its anchor or "
            "preserved prompts too; change those or choose another scope."
        )
    return torch.tensor(sorted(targets - kept), device=model.vocabulary.device)


@contextmanager
def first_token_detached(model: TextToImage, *, enabled: bool) -> Iterator[None]:
    """Cut the gradient at the first token's keys and values of every cross-attention, for the length of the context."""

    def cut(_module: nn.Module, _inputs: object, projected: Tensor) -> Tensor:
        return torch.cat([projected[:, :1].detach(), projected[:, 1:]], dim=1)

    hooks = [
        module.register_forward_hook(cut)
        for name, module in model.unet.named_modules()
        if enabled and name.endswith((".attn2.to_k", ".attn2.to_v"))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
